"""Checkpoints that a killed process can't break.

A checkpoint is written into a staging directory, flushed to disk, sealed by a manifest of sizes and SHA-256
hashes that is written last, and appears under its name in one rename. Resuming takes the newest one whose
manifest holds; whatever a crash left behind has another name or no manifest. One directory holds the checkpoints of
one run: a fresh start beside those of another is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .. import disk
from ..errors import CheckpointError, YgivenxError

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
STAGING = "_staging"  # uploads to the hub leave out what begins with an underscore
_ASIDE = ".replaced"  # behind the name of a checkpoint that makes room for another of its name
_NAME = re.compile(r"checkpoint-(\d+)")


def writing(path: Path) -> AbstractContextManager[None]:
    """Raises CheckpointError for what a full disk makes each library raise."""
    fix = "make room; --resume auto (resume='auto') goes on from the newest complete checkpoint"
    return disk.writing(path, fix, CheckpointError, (OSError, RuntimeError, SafetensorError))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises CheckpointError for whatever a file makes its reader raise: hashes hold for what is sealed as it is."""
    try:
        yield
    except YgivenxError:
        raise
    except Exception as error:
        raise CheckpointError(
            "it can't be read",
            where=str(path),
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix="resume from an earlier checkpoint; delete this one, if you don't know who wrote it",
        ) from error


def seal(directory: Path) -> None:
    """Write the manifest of `directory`, and flush every file to disk."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": _hash(path)}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=1))
    disk.sync_all(directory)


def clear(staging: Path) -> None:
    """An empty staging directory: what an earlier crash left in it is deleted."""
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def publish(staged: Path, final: Path) -> None:
    """Give a sealed directory its name in one rename; one that has it is put aside before, and deleted after."""
    # At each moment a complete checkpoint has a name that `mend` knows: a crash between any two lines loses none.
    aside = final.with_name(final.name + _ASIDE)
    if final.exists():
        os.rename(final, aside)
    os.rename(staged, final)
    disk.sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def mend(run_dir: Path) -> None:
    """Undo what a crash inside `publish` left: a checkpoint that was put aside and not replaced has its name again."""
    for aside in run_dir.glob(f"checkpoint-*{_ASIDE}"):
        final = aside.with_name(aside.name.removesuffix(_ASIDE))
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another rank was faster
                os.rename(aside, final)


def start(run_dir: Path, resume: str | bool | None, own: Container[str] = ()) -> Path | None:
    """The complete checkpoint that a run in `run_dir` begins from; None for a fresh start.

    resume: a checkpoint's directory, True (the newest complete one), "auto" (the same, or a fresh start), or None.
    own: names of checkpoints in `run_dir` that may stand beside a fresh start. Raises CheckpointError if what was
    asked for isn't there, and where checkpoints of another run are: the newest of both would be kept and resumed from.
    """
    with reading(run_dir):
        return _start(run_dir, resume, own)


def _start(run_dir: Path, resume: str | bool | None, own: Container[str]) -> Path | None:
    mend(run_dir)
    if resume in (True, "auto"):
        found = newest(run_dir)
        if found is None and resume is True:
            raise CheckpointError(
                "no complete checkpoint", where=str(run_dir), fix='use "auto" to start afresh'
            )
    else:
        found = Path(str(resume)) if resume else None
        if found is not None:
            verify(found)
    others = [p.name for p in listed(run_dir) if p.name not in own]
    if others and (found is None or found.resolve().parent != run_dir.resolve()):
        raise CheckpointError(
            f"checkpoints of another run are there: {', '.join(others)}",
            where=str(run_dir),
            why="old and new ones would be counted, deleted and resumed from together",
            fix="--resume auto (resume='auto') goes on with that run; a new one needs another output directory",
        )
    return found


def verify(directory: Path) -> None:
    """Raise CheckpointError unless the manifest is there and every file has its size and hash."""
    with reading(directory):  # a disk may fail, too
        _verify(directory)


def _verify(directory: Path) -> None:
    manifest = directory / MANIFEST
    fix = "resume from an earlier checkpoint (--resume auto, or resume='auto', finds the newest complete one)"
    if not directory.is_dir():
        raise CheckpointError("there is no such checkpoint", where=str(directory), fix=fix)
    if not manifest.is_file():
        raise CheckpointError(
            "no manifest", where=str(directory), why="it was not written to its end", fix=fix
        )
    try:
        files = _entries(manifest.read_bytes())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("unreadable manifest", where=str(manifest), why=repr(error), fix=fix) from error
    for name, (size, sha256) in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError("a file is missing", where=str(path), why="the manifest lists it", fix=fix)
        # The size first, which costs nothing.
        if path.stat().st_size != size or _hash(path) != sha256:
            raise CheckpointError(
                "a file was altered", where=str(path), why="its hash differs from the manifest", fix=fix
            )


def _entries(manifest: bytes) -> dict[str, tuple[int, str]]:
    """(size, SHA-256) by name. Raises one of four errors of Python for whatever damage there is."""
    entries = {
        str(name): (int(file["size"]), str(file["sha256"]))
        for name, file in json.loads(manifest)["files"].items()
    }
    if not entries:
        raise ValueError("it lists no file")
    return entries


def newest(run_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps, None if there is none. Those that it passes over are logged."""
    for path in reversed(listed(run_dir)):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("%s is passed over: %s (%s)", path.name, error.what, error.where)
            continue
        return path
    return None


def listed(run_dir: Path) -> list[Path]:
    """Directories named checkpoint-N, by rising N, complete or not."""
    if not run_dir.is_dir():
        return []
    return sorted((p for p in run_dir.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=_step)


def rotate(run_dir: Path, keep: int | None, step: int, protect: str | None = None) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`; `protect` (the best one so far) always stays.

    Later ones stand there where a run was resumed from before them; they are replaced as it reaches them.
    """
    if keep is None:
        return
    for path in [p for p in listed(run_dir) if _step(p) <= step][: -max(keep, 1)]:
        if protect is None or path.resolve() != Path(protect).resolve():
            shutil.rmtree(path)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
