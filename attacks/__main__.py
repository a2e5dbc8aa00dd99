"""`python -m attacks [NAME ...] [--scale S] [--write]`: run attacks and print their outcomes; `--write` keeps them."""

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

NAMES = ("templates", "resume", "checkpoints")
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m attacks", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}; else all")
    parser.add_argument("--scale", type=float, default=1.0, help="the share of all cases")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS}/NAME.json")
    arguments = parser.parse_args()
    bad = 0
    for name in arguments.names:
        start = time.perf_counter()
        outcome = importlib.import_module(f"attacks.{name}").run(arguments.scale)
        outcome["scale"] = arguments.scale
        outcome["seconds"] = round(time.perf_counter() - start)
        bad += len(outcome["bad"])
        shown = {k: v for k, v in outcome.items() if k != "table"}
        print(name, json.dumps(shown, indent=1, ensure_ascii=False))
        if arguments.write:
            text = json.dumps(outcome, indent=1, ensure_ascii=False)
            (RESULTS / f"{name}.json").write_text(text + "\n")
    return min(bad, 1)


if __name__ == "__main__":
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
