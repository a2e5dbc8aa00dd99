"""Run in a Python that has a trainer, and needs nothing of ours: `python child.py ADAPTER TASK` prints a line a row.

TASK is a JSON file: tokenizer (a directory), family, rows, settings. A line is JSON and has
ids and weights, or an error.
"""

import json
import os
import runpy
import sys
import traceback


def main(adapter: str, task_file: str) -> None:
    """Print what an adapter's `encode` gives for each row; what a trainer prints goes to standard error."""
    with open(task_file, encoding="utf-8") as file:
        task = json.load(file)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    encoder = runpy.run_path(adapter)["encoder"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    encode = encoder(tokenizer, task["family"], **task["settings"])
    for row in task["rows"]:
        try:
            ids, weights = encode(row)
            line = {"ids": [int(i) for i in ids], "weights": [float(w) for w in weights]}
        except Exception as error:
            line = {"error": f"{type(error).__name__}: {error}"[:300]}
            traceback.print_exc()
        print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
