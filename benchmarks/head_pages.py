"""What the first touch of a large gradient costs, on large and on small pages: at once and after a pause.

    python benchmarks/head_pages.py --out benchmarks/results/head_pages.json

A tensor is made, filled with zeros and freed, several times in a row: milliseconds of each. Between the series the
process sleeps, so that a machine that gives its free pages back to a host has the time to do so.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from ygivenx.head import pages


def touches(count: int, size: int) -> list[float]:
    found = []
    for _ in range(count):
        tensor = pages.empty((size,), torch.uint8, torch.device("cpu"))
        start = time.perf_counter()
        tensor.zero_()
        found.append(round((time.perf_counter() - start) * 1e3, 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=272, help="bfloat16 [151936, 896] by default")
    parser.add_argument("--pause", type=float, default=4, help="seconds between the series")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    told: dict[str, object] = {
        "megabytes": args.megabytes, "pause": args.pause, "threads": torch.get_num_threads(),
        "the machine gives pages back": pages.returns_free_pages(), "milliseconds": [],
    }  # fmt: skip
    series: list[tuple[str, list[float]]] = []
    for _ in range(4):
        for kind in ("large", "small"):
            pages.returns_free_pages = lambda small=kind == "small": small  # type: ignore[assignment]
            series.append((kind, touches(4, args.megabytes << 20)))
            time.sleep(args.pause)
    told["milliseconds"] = [{"pages": kind, "in a row": found} for kind, found in series]
    print(json.dumps(told, indent=1))
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
