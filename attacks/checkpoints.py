"""Faults and damage of checkpoints: whatever happens, a run goes on to the same bits from a complete one, or says why.

- faults: each call of the file system that a save makes fails once, with a full disk (ENOSPC) and with EIO, as an error
  and after half of the bytes were written
- damage: bits of each file of a checkpoint (full, LoRA) are flipped, one at a time; files are cut, emptied, deleted
- power failure: what wasn't flushed to disk when a save was cut short is lost, file by file
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ygivenx.errors import CheckpointError
from ygivenx.training import checkpoint

from .resume import trainer, weights

CALLS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "stat")


class Faults:
    """Counts the calls that touch a folder, and lets the one of number `at` fail with `error`."""

    def __init__(self, folder: Path, at: int = -1, error: int = errno.EIO, torn: bool = False) -> None:
        self.folder, self.at, self.error, self.torn, self.count = str(folder), at, error, torn, 0

    def pass_or_fail(self, path: Any) -> None:
        if isinstance(path, str | os.PathLike) and str(path).startswith(self.folder):
            self.count += 1
            if self.count - 1 == self.at:
                if self.torn and "checkpoint-1" not in str(path) and os.path.isfile(path):
                    os.truncate(path, os.path.getsize(path) // 2)
                raise OSError(self.error, os.strerror(self.error), str(path))


@contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """While it lasts, every call of `CALLS` and every file that is opened to be written goes through `faults`."""
    originals = {name: getattr(os, name) for name in CALLS}
    opening, syncing = builtins.open, originals["fsync"]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            faults.pass_or_fail(os.readlink(f"/proc/self/fd/{path}") if original is syncing else path)
            return original(path, *args, **kwargs)

        return call

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            faults.pass_or_fail(path)
        return opening(path, mode, *args, **kwargs)

    try:
        for name, original in originals.items():
            setattr(os, name, wrapped(original))
        builtins.open = io.open = opened  # type: ignore[assignment]
        yield faults
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        builtins.open = io.open = opening  # type: ignore[assignment]


def _straight(folder: Path, case: dict[str, Any]) -> bytes:
    """Three steps; the weights after them, and their checkpoints in the folder."""
    trainer(folder, 3, case).train()
    return weights(folder / "checkpoint-3")


def _begun(straight: Path, folder: Path) -> Path:
    shutil.copytree(straight / "checkpoint-1", folder / "checkpoint-1")
    return folder


def _goes_on(folder: Path, case: dict[str, Any], end: bytes) -> bool:
    trainer(folder, 3, case).train(resume_from_checkpoint="auto")
    return weights(folder / "checkpoint-3") == end


def faults(
    straight: Path, end: bytes, case: dict[str, Any], scale: float
) -> tuple[dict[str, int], list[str]]:
    """A save of step 2 in which one call fails."""
    counts, bad = {"an error of ours": 0, "saved all the same": 0}, []
    with tempfile.TemporaryDirectory() as f, injected(Faults(Path(f))) as counted:
        trainer(_begun(straight, Path(f)), 2, case).train(resume_from_checkpoint="auto")
    kinds = [(errno.ENOSPC, False), (errno.EIO, False), (errno.EIO, True)]
    places = [(at, *kind) for at in range(counted.count) for kind in kinds]
    for at, error, torn in places[:: max(1, round(1 / scale))]:
        with tempfile.TemporaryDirectory() as f:
            run = trainer(_begun(straight, Path(f)), 2, case)
            name = f"call {at} of {counted.count}, {errno.errorcode[error]}{', torn' if torn else ''}"
            try:
                with injected(Faults(Path(f), at, error, torn)):
                    run.train(resume_from_checkpoint="auto")
                counts["saved all the same"] += 1
            except CheckpointError:
                counts["an error of ours"] += 1
            except BaseException as e:
                bad.append(f"{name}: {type(e).__name__}: {e}")
            if not _goes_on(Path(f), case, end):
                bad.append(f"{name}: other weights afterwards")
    return counts, bad


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


class PowerFailure(BaseException):
    """The machine is off."""


def power(straight: Path, end: bytes, case: dict[str, Any], scale: float) -> tuple[dict[str, int], list[str]]:
    """A save that ends at each of its calls, after which files that weren't flushed are empty."""
    counts, bad = {"resumed to the same bits": 0}, []
    with tempfile.TemporaryDirectory() as f, injected(Faults(Path(f))) as counted:
        trainer(_begun(straight, Path(f)), 2, case).train(resume_from_checkpoint="auto")
    for at in range(0, counted.count, max(1, round(1 / scale))):
        with tempfile.TemporaryDirectory() as f:
            run, folder = trainer(_begun(straight, Path(f)), 2, case), Path(f)
            flushed = {str(p) for p in folder.rglob("*")}
            cut = _Cut(folder, at, flushed)
            try:
                with injected(cut):
                    run.train(resume_from_checkpoint="auto")
            except PowerFailure:
                pass
            for path in folder.rglob("*"):
                if (
                    path.is_file()
                    and path.stat().st_ino not in cut.flushed_nodes
                    and str(path) not in flushed
                ):
                    path.write_bytes(b"")
            if _goes_on(folder, case, end):
                counts["resumed to the same bits"] += 1
            else:
                bad.append(f"power failure at call {at}: other weights afterwards")
    return counts, bad


class _Cut(Faults):
    """Ends at one call, and remembers which files were flushed before it."""

    def __init__(self, folder: Path, at: int, flushed: set[str]) -> None:
        super().__init__(folder, at)
        self.flushed_nodes: set[int] = set()

    def pass_or_fail(self, path: Any) -> None:
        if isinstance(path, str | os.PathLike) and str(path).startswith(self.folder):
            self.count += 1
            if self.count - 1 == self.at:
                raise PowerFailure


def run(scale: float = 1.0) -> dict[str, Any]:
    """Counts of outcomes; `bad` lists what was lost, silent, or an error that isn't ours."""
    import sys

    from .resume import TESTS

    sys.path.insert(0, str(TESTS))
    outcomes: dict[str, Any] = {}
    bad: list[str] = []
    for name, case in {"full": {}, "LoRA": {"lora": True}}.items():
        with tempfile.TemporaryDirectory() as folder:
            straight = Path(folder)
            end = _straight(straight, case)
            for kind, (counts, found) in {
                "faults": faults(straight, end, case, scale if name == "full" else scale / 4),
                "damage": damage(straight, scale),
                "power failures": power(straight, end, case, scale if name == "full" else scale / 4),
            }.items():
                outcomes[f"{kind}, {name}"] = counts
                bad += [f"{name}: {b}" for b in found]
    return {"outcomes": outcomes, "bad": bad}
