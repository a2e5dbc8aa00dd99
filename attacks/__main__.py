"""`python -m attacks [NAME ...] [--scale S] [--only WORD] [--write]`: run attacks and print their outcomes.

`--write` keeps them in `attacks/results/`. With `--only`, the cases whose name has the word, beside those kept before.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

NAMES = ("templates", "resume", "checkpoints", "files", "forged", "fuzz")
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m attacks", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}; else all")
    parser.add_argument("--scale", type=float, default=1.0, help="the share of all cases")
    parser.add_argument("--only", default="", help="cases whose name has this text (not of templates)")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=RESULTS, help=f"write NAME.json there, else in {RESULTS}"
    )
    arguments = parser.parse_args()
    bad = 0
    for name in arguments.names:
        start = time.perf_counter()
        only = [arguments.only] if arguments.only else []
        outcome = importlib.import_module(f"attacks.{name}").run(arguments.scale, *only)
        outcome |= {"scale": arguments.scale, "seconds": round(time.perf_counter() - start)}
        bad += len(outcome["bad"])
        shown = {k: v for k, v in outcome.items() if k != "table"}
        print(name, json.dumps(shown, indent=1, ensure_ascii=False))
        if arguments.write:
            path = arguments.write / f"{name}.json"
            kept = with_others(outcome, path) if only and path.exists() else outcome
            path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return min(bad, 1)


def with_others(outcome: dict[str, Any], path: Path) -> dict[str, Any]:
    """An outcome of some cases, with those of the others as they were kept."""
    before = json.loads(path.read_text())
    cases = {k: before[k] | v for k, v in outcome.items() if isinstance(v, dict)}
    run_now = [name for v in outcome.values() if isinstance(v, dict) for name in v]
    others = [b for b in before["bad"] if not any(b.startswith(name) for name in run_now)]
    scale, seconds = min(before["scale"], outcome["scale"]), before["seconds"] + outcome["seconds"]
    return {**outcome, **cases, "bad": [*others, *outcome["bad"]], "scale": scale, "seconds": seconds}


if __name__ == "__main__":
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
