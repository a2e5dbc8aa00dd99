"""One writer at a time: a lock on a file beside what is written, which ends with its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError


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
