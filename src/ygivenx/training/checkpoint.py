"""Checkpoints that a killed process can't break.

A checkpoint is written into a staging directory, flushed to disk, sealed by a manifest of sizes and SHA-256
hashes that is written last, and appears under its name in one rename. Resuming takes the newest one whose
manifest holds; whatever a crash left behind has another name or no manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from ..errors import CheckpointError

MANIFEST = "manifest.json"
STAGING = ".staging"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(directory: Path) -> None:
    """Flush every file of `directory` to disk, then write its manifest."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync(path)
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": _hash(path)}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=1))
    _sync(manifest)
    for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        _sync(folder)


def clear(staging: Path) -> None:
    """An empty staging directory: what an earlier crash left in it is deleted."""
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def publish(staged: Path, final: Path) -> None:
    """Give a sealed directory its name in one rename; one of the same name is replaced."""
    if final.exists():
        shutil.rmtree(final)
    os.rename(staged, final)
    _sync(final.parent)


def verify(directory: Path) -> None:
    """Raise CheckpointError unless the manifest is there and every file has its size and hash."""
    manifest = directory / MANIFEST
    fix = "resume from an earlier checkpoint (resume='auto' finds the newest complete one)"
    if not manifest.is_file():
        raise CheckpointError(
            "no manifest", where=str(directory), why="it was not written to its end", fix=fix
        )
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("unreadable manifest", where=str(manifest), why=str(error), fix=fix) from error
    for name, told in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError("a file is missing", where=str(path), why="the manifest lists it", fix=fix)
        if path.stat().st_size != told["size"] or _hash(path) != told["sha256"]:
            raise CheckpointError(
                "a file was altered", where=str(path), why="its hash differs from the manifest", fix=fix
            )


def newest(run_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps, None if there is none."""
    for path in reversed(listed(run_dir)):
        try:
            verify(path)
        except CheckpointError:
            continue
        return path
    return None


def listed(run_dir: Path) -> list[Path]:
    """Directories named checkpoint-N, by rising N, complete or not."""
    if not run_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in run_dir.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def rotate(run_dir: Path, keep: int | None, protect: str | None = None) -> None:
    """Delete all but the newest `keep` checkpoints; `protect` (the best one so far) always stays."""
    if keep is None:
        return
    for path in listed(run_dir)[: -max(keep, 1)]:
        if protect is None or path.resolve() != Path(protect).resolve():
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
