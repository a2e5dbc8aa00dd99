"""What is written is whole: flushed to disk before it has its name, by one writer at a time, or an error says why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError, DataError, YgivenxError


@contextmanager
def writing(
    path: Path,
    fix: str = "make room, or name another place; run it again",
    error: type[YgivenxError] = DataError,
    raised: tuple[type[Exception], ...] = (OSError,),
) -> Iterator[None]:
    """Raises `error` for what a full or broken disk makes a library raise."""
    try:
        yield
    except raised as cause:
        raise error("it couldn't be written", where=str(path), why=str(cause), fix=fix) from cause


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write to. Afterwards that file is flushed and becomes `path`, or it goes and `path` is what it was.

    The folder is made if it isn't there.
    """
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        sync(partial)  # a name that appears before its content would be an empty file after a loss of power
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Give a file another text, at once."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_all(directory: Path) -> None:
    """Flush every file below a directory to disk, and the directories."""
    for path in (directory, *directory.rglob("*")):
        sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(path: Path, what: str, enabled: bool = True) -> Iterator[None]:
    """Hold `path`.lock. Raises ConfigError, with the holder's process id, while another process holds it.

    The system releases the lock when the process ends in whatever way, so nothing has to be cleaned up. Where there
    are no such locks (Windows, some network file systems) none is held. enabled: False for ranks beside a writer.
    """
    try:
        import fcntl
    except ImportError:
        enabled = False
    if not enabled:
        yield
        return
    file = path.with_name(f".{path.name}.lock")
    # Not "w": that would empty the holder's id before it is known whether the lock is free.
    with file.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise ConfigError(
                f"another process (id {handle.read().strip() or 'unknown'}) is writing there",
                where=str(path.parent if what == "ygx train" else path),
                why="two writers would mix what they write",
                fix="wait for it, or name another place",
            ) from error
        # A file system without locks: two writers there are the user's to avoid.
        except OSError:
            pass
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
