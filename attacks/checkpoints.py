"""Faults and damage of checkpoints: whatever happens, a run goes on to the same bits from a complete one, or says why.

- faults: each call of the file system that a save makes, by `faulty.py`; the checkpoint before is deleted by it
- damage: bits of each file of a checkpoint are flipped, one at a time; files are cut, emptied, deleted
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ygivenx.errors import CheckpointError
from ygivenx.training import checkpoint

from .faulty import Work, attacked, preloaded
from .resume import TESTS, state, trainer

CASES: dict[str, dict[str, Any]] = {
    "full": {"keep": 1},
    "full, two workers, dropout": {"keep": 1, "workers": 2, "dropout": 0.1},
    "LoRA": {"keep": 2, "lora": True},
}


def saving(straight: Path, case: dict[str, Any]) -> Work:
    """A run that is taken up after step 1 and saves step 2; afterwards it has to reach step 3 of the straight run."""
    end = state(straight / "checkpoint-3")

    def right(folder: Path) -> str:
        if (
            checkpoint.start(folder, "auto") is None
        ):  # a fresh start would give the same bits, and lose the work
            return "no checkpoint is left"
        trainer(folder, 3, case).train(resume_from_checkpoint="auto")
        return "" if state(folder / "checkpoint-3") == end else "other bits afterwards"

    return Work(
        lambda folder: shutil.copytree(straight / "checkpoint-1", folder / "checkpoint-1"),
        lambda folder: trainer(folder, 2, case).train(resume_from_checkpoint="auto"),
        right,
    )


def damage(straight: Path, scale: float) -> tuple[dict[str, int], list[str]]:
    """Bits of every file, and files that are cut: the older checkpoint is taken, and what is damaged is refused."""
    counts, bad, rng = {"refused, and passed over": 0}, [], random.Random(0)
    newest, older = straight / "checkpoint-3", straight / "checkpoint-2"
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        data = path.read_bytes()
        places = rng.sample(range(8 * len(data)), min(8 * len(data), round(1 + 400 * scale)))
        for kind, damaged in [*((f"bit {n}", _flipped(data, n)) for n in places), *_cuts(data, rng)]:
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            try:
                checkpoint.verify(newest)
                bad.append(f"{path.name}, {kind}: not seen")
            except CheckpointError:
                if checkpoint.newest(straight) == older:
                    counts["refused, and passed over"] += 1
                else:
                    bad.append(f"{path.name}, {kind}: {checkpoint.newest(straight)} is taken")
            except Exception as e:
                bad.append(f"{path.name}, {kind}: {type(e).__name__}: {e}")
        path.write_bytes(data)
    checkpoint.verify(newest)
    return counts, bad


def _flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def _cuts(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    yield "deleted", None
    if data:
        yield "emptied", b""
        yield "cut", data[: rng.randrange(len(data))]
        yield "a block of NUL", data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def run(scale: float = 1.0, only: str = "") -> dict[str, Any]:
    """Counts of outcomes; `bad` lists what was lost, silent, or an error that isn't ours."""
    return preloaded("checkpoints", scale, only)


def outcomes(scale: float, only: str) -> dict[str, Any]:
    """`run` in a process that `faults.c` is loaded into."""
    sys.path.insert(0, str(TESTS))
    found: dict[str, Any] = {}
    bad: list[str] = []
    for name, case in ((n, c) for n, c in CASES.items() if only in n):
        with tempfile.TemporaryDirectory() as folder:
            straight = Path(folder)
            trainer(straight, 3, case | {"keep": None}).train()
            attacks = {"faults": attacked(saving(straight, case), scale)}
            if "workers" not in case:
                attacks["damage"] = damage(straight, scale)
            for kind, (counts, worse) in attacks.items():
                found[f"{kind}, {name}"] = counts
                bad += [f"{name}: {b}" for b in worse]
    return {"outcomes": found, "bad": bad}


if __name__ == "__main__":
    import logging

    logging.disable(logging.WARNING)
    print(json.dumps(outcomes(float(sys.argv[1]), sys.argv[2])))
