"""Run in a Python that has a trainer, and needs nothing of ours: `python child.py ADAPTER TASK` prints lines of JSON.

TASK is a JSON file: rows, and jobs of tokenizer (a directory), family and settings. A line for each row of each job has
ids and weights, or an error.
"""

import json
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from typing import Any


def main(adapter: str, task_file: str) -> None:
    """Print what an adapter's `encode` gives for each row; what a trainer prints goes to standard error."""
    with open(task_file, encoding="utf-8") as file:
        task = json.load(file)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = runpy.run_path(adapter)
    for job in task["jobs"]:
        for line in lines(module, job, task["rows"]):
            print(json.dumps(line), file=out, flush=True)


def lines(module: dict[str, Any], job: dict[str, Any], rows: list[Any]) -> Iterator[dict[str, Any]]:
    """What becomes of each row in one job."""
    from transformers import AutoTokenizer

    try:
        if job["family"] not in module.get("NAMES", [job["family"]]):
            raise ValueError(f"it has no template for {job['family']}")
        tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
        encode = module["encoder"](tokenizer, job["family"], **job["settings"])
    except Exception as error:
        yield from [failed(error)] * len(rows)
        return
    for row in rows:
        try:
            ids, weights = encode(row)
            yield {"ids": [int(i) for i in ids], "weights": [float(w) for w in weights]}
        except Exception as error:
            yield failed(error)


def failed(error: Exception) -> dict[str, Any]:
    """A line for what a trainer raised."""
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    main(*sys.argv[1:])
