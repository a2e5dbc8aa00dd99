"""This checkout against another commit of it: the same steps in turns, so that the machine is the same for both.

    OMP_NUM_THREADS=1 python benchmarks/against.py d64844a [eight_completions six_turns scores] [--rounds 5]

Each commit runs in a process of its own and loads SmolLM2-135M-Instruct; a round that warms up, then `--rounds` in
which both are asked in turn, the first one alternating. Printed: the median processor seconds of each, which other load
on the machine changes little with one thread, and the median of the rounds' ratios, this / other, with the smallest and
largest. A step is forward and backward; scores are of 32 continuations of eight prompts. One line for each case goes to
benchmarks/results/against.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "against.jsonl"
VOCAB = 49_152


def eight_completions(rng: Any) -> list[tuple[Any, int]]:
    """(ids, tokens of x) of each sequence."""
    x = rng.integers(100, VOCAB, 400)
    return [(np.r_[x, rng.integers(100, VOCAB, 77)], 400) for _ in range(8)]


def six_turns(rng: Any) -> list[tuple[Any, int]]:
    """Each trained with its reasoning, which history leaves out."""
    history, rows = np.zeros(0, np.int64), []
    for _ in range(6):
        history = np.r_[history, rng.integers(100, VOCAB, 70)]
        reasoning, answer = rng.integers(100, VOCAB, 95), rng.integers(100, VOCAB, 100)
        rows.append((np.r_[history, reasoning, answer], len(history)))
        history = np.r_[history, answer]
    return rows


def pairs(rng: Any) -> list[tuple[str, str]]:
    def words(count: int) -> str:
        return "".join(f" {n}" for n in rng.integers(0, 10, count))

    shots = "Numbers:" + words(250)
    return [(f"{shots}\n{x}:", words(6)) for x in (words(20) for _ in range(8)) for _ in range(4)]


STEPS = {f.__name__: f for f in (eight_completions, six_turns)}
CASES = [*STEPS, "scores"]


def work(path: str, gguf_file: str) -> None:
    """What a process does: for each case that it reads, a line with the seconds that it took and the result."""
    import torch

    import ygivenx as yx

    yx.keep_freed_memory()
    model, tokenizer = yx.load(path, gguf_file=gguf_file)

    def step(case: str) -> float:
        rows = [
            yx.Sequence(ids, (np.arange(len(ids)) >= x).astype(np.float32))
            for ids, x in STEPS[case](np.random.default_rng(0))
        ]
        model.zero_grad()
        value = yx.loss(model, rows).value
        value.backward()
        return float(value.detach())

    def scores(_case: str) -> float:
        with torch.no_grad():
            found: list[Any] = yx.score(model, tokenizer, pairs(np.random.default_rng(0)))
        return float(sum(s.log_p_y_given_x for s in found))

    run: dict[str, Callable[[str], float]] = dict.fromkeys(STEPS, step) | {"scores": scores}
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.process_time()
        result = run[line.strip()](line.strip())
        print(time.process_time() - started, result, flush=True)


class Side:
    """A checkout in a process of its own."""

    def __init__(self, checkout: Path, place: tuple[str, str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "work", *place], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit("a process ended early; its error stands above")
        return line.strip()

    def __call__(self, case: str) -> tuple[float, float]:
        """(seconds, result)."""
        assert self.process.stdin is not None
        print(case, file=self.process.stdin, flush=True)
        seconds, result = map(float, self._line().split())
        return seconds, result


def compare(case: str, this: Side, other: Side, rounds: int) -> dict[str, Any]:
    exact, theirs = this(case)[1], other(case)[1]
    if abs(exact - theirs) > 1e-4 * abs(theirs):
        raise SystemExit(f"{case}: {exact} here, {theirs} there")
    seconds = list[tuple[float, float]]()
    for i in range(rounds):
        first, second = (this, other) if i % 2 else (other, this)
        a, b = first(case)[0], second(case)[0]
        seconds.append((a, b) if i % 2 else (b, a))
    ratios = [a / b for a, b in seconds]
    return {
        "case": case, "this": median(a for a, _ in seconds), "other": median(b for _, b in seconds),
        "ratio": median(ratios), "least": min(ratios), "most": max(ratios), "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="what this checkout is compared with")
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    from ygivenx.models.resolve import sample_model_path

    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", args.commit, "src"], check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        this, other = (Side(checkout, sample_model_path()) for checkout in (ROOT, Path(folder)))
        for case in args.cases or CASES:
            record = compare(case, this, other, args.rounds)
            print(json.dumps(record))
            with RESULTS.open("a") as out:
                print(json.dumps({"command": "python " + " ".join(sys.argv), **record}), file=out)
        for side in (this, other):
            side.process.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        main()
