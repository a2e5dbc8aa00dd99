"""Faults of the disk at every call of the file system that some work makes, as `faults.c` brings them about.

Each time the work is done in a fork of this process, where one call fails: with ENOSPC or EIO, or a write halfway; or
the process ends there, as if killed; or the power fails, and what wasn't flushed is lost: the contents of files, and
in a second way also renames whose folder wasn't flushed (what was deleted stays so). Then the work is done again.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CREATES = ("create", "write", "mkdir", "mkdirat", "rename", "fsync", "ftruncate64", "ftruncate")
ENDED, OURS, KILLED = 0, 2, 77
LONGEST = 60  # seconds of one piece of work


class Kind(NamedTuple):
    """errno, or −1 for half a write, or −2 for the end of the process; which calls it can happen to; what is lost."""

    how: int
    calls: tuple[str, ...] = ()
    contents: bool = False
    renames: bool = False


KINDS = {
    "full disk": Kind(errno.ENOSPC, CREATES),
    "error": Kind(errno.EIO),
    "torn write": Kind(-1, ("write",)),
    "killed": Kind(-2),
    "power failure": Kind(-2, contents=True),
    "power failure, renames lost": Kind(-2, contents=True, renames=True),
}


@dataclass
class Work:
    """begin: fills a new folder. write: what is attacked there. right: whether what is left is right, or becomes so.

    `write` and `right` run in a fork; what `right` returns is empty, or says what is wrong.
    """

    begin: Callable[[Path], Any]
    write: Callable[[Path], Any]
    right: Callable[[Path], str]


def preloaded(name: str, scale: float, only: str) -> dict[str, Any]:
    """What `outcomes` of attacks.NAME finds, in a process that `faults.c` is loaded into."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/faults.so"
        source = str(Path(__file__).with_name("faults.c"))
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", f"attacks.{name}", str(scale), only], stdout=subprocess.PIPE,
            text=True, check=True, env={**os.environ, "LD_PRELOAD": library, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return dict(json.loads(done.stdout.splitlines()[-1]))


def attacked(work: Work, scale: float) -> tuple[dict[str, int], list[str]]:
    """Counts of outcomes by kind of fault, and what must not be."""
    gc.collect()
    gc.freeze()  # forks share what is there as long as nobody counts it
    calls = [line[0] for line in _once(work, "counted", Kind(0), -1)[1]]
    counts, bad = Counter[str](), list[str]()
    for name, kind in KINDS.items():
        places = [n for n, call in enumerate(calls) if not kind.calls or call in kind.calls]
        for at in places[:: max(1, round(1 / scale))]:
            outcome, _, wrong = _once(work, name, kind, at)
            counts[f"{name}: {outcome}"] += 1
            if os.environ.get("SHOW"):
                print(name, at, calls[at], outcome, wrong[-200:], file=sys.stderr, flush=True)
            if wrong:
                bad.append(f"{name} at call {at} ({calls[at]}): {wrong}")
    return dict(counts), bad


def _once(work: Work, name: str, kind: Kind, at: int) -> tuple[str, list[list[str]], str]:
    """(the outcome, the calls, what is wrong) of one fault."""
    with tempfile.TemporaryDirectory() as outer:
        folder, log = Path(outer) / "folder", Path(outer) / "log"
        folder.mkdir()
        work.begin(folder)
        status, text, _ = forked(lambda: (_arm(folder, at, kind.how, log), work.write(folder)))
        calls = [line.split("\t") for line in log.read_text().splitlines()]
        if kind.renames:
            undo_renames(calls, log)
        if kind.contents:
            lose_contents(folder, calls, zeros=at % 2 == 1)
        outcomes = {ENDED: "done all the same", OURS: "an error of ours", KILLED: "ended there"}
        if status not in outcomes:
            return "another error", calls, f"status {status}: {text[-300:]}"
        code, text, wrong = forked(lambda: work.right(folder))
        return (
            outcomes[status],
            calls,
            wrong if code == ENDED else f"afterwards, status {code}: {text[-300:]}",
        )


def _arm(folder: Path, at: int, how: int, log: Path) -> None:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.arm(str(folder).encode(), ctypes.c_long(at), ctypes.c_long(how), str(log).encode())


def forked(work: Callable[[], Any]) -> tuple[int, str, str]:
    """(exit status, standard output and error, what it returned as text) of work in a fork of this process."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as returned:
        child = os.fork()
        if not child:
            os._exit(_in_child(work, output.fileno(), returned.fileno()))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (output, returned):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return (3 if "Traceback (most" in texts[0] else status), *texts


def _in_child(work: Callable[[], Any], output: int, returned: int) -> int:
    from ygivenx.errors import YgivenxError

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LONGEST)
    for fd in (1, 2):
        os.dup2(output, fd)
    sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115 (it ends with the process)
    code = ENDED
    try:
        os.write(returned, str(work()).encode())
    except YgivenxError as error:
        print(error)
        code = OURS
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else ENDED
    except BaseException:
        print(traceback.format_exc())
        code = 3
    sys.stdout.flush()
    return code


def lose_contents(folder: Path, calls: list[list[str]], zeros: bool) -> None:
    """What was written since a file's last fsync is lost: cut off, or zeros in its place."""
    flushed, dirty = dict[str, int](), set[str]()
    for name, _, _, inode, size in calls:
        if name in ("fsync", "fdatasync"):
            flushed[inode] = int(size)
            dirty.discard(inode)
        elif name in ("create", "write"):
            dirty.add(inode)
    for path in (p for p in folder.rglob("*") if p.is_file()):
        if (inode := str(path.stat().st_ino)) in dirty:
            length = path.stat().st_size
            os.truncate(path, min(flushed.get(inode, 0), length))
            if zeros:
                os.truncate(path, length)


def undo_renames(calls: list[list[str]], log: Path) -> None:
    """Those whose folder wasn't flushed afterwards; what they replaced is back."""
    for number in reversed(range(len(calls))):
        name, source, target, _, _ = calls[number]
        parent = os.path.dirname(target)
        if name != "rename" or any(c[0] == "fsync" and c[1] == parent for c in calls[number:]):
            continue
        if os.path.exists(target) and not os.path.exists(source) and os.path.isdir(os.path.dirname(source)):
            os.rename(target, source)
            if (replaced := Path(f"{log}.{number}")).exists():
                shutil.move(replaced, target)
