"""Remove each guard of `guards.py` in a copy of the tree, one at a time, and demand a red test: `make mutate`.

A guard without a test in which it trips can be lost without a word. For each one the copy gets the changed line, the
named tests run, and they have to fail. Exit code 1: a guard survived without a reason, fits no line of its module any
more, or fewer than 90 % of a module's guards were found.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy  # noqa: F401 - loaded once, here: the tests of each guard run in a fork of this process
import pytest
import torch  # noqa: F401
import transformers  # noqa: F401
from guards import GUARDS, Guard

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds for the tests of one guard; a change that makes them run on is found, too
BUSY = 60  # seconds of those in which they computed: tests that only wait, as for a lock, found nothing
LEAST = 0.9  # share of each module's guards that tests have to find


def copy_tree(to: Path) -> None:
    """What git knows, and what is new and not ignored."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    if (ROOT.parent / "shared").is_dir() and not (to.parent / "shared").exists():
        (to.parent / "shared").symlink_to(ROOT.parent / "shared")


def run_tests(tree: Path, selection: str) -> tuple[str, str]:
    """("passed", "failed", "error", "endless" or "stuck", the tests' output), from a fork of this process."""
    with tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if not child:
            _run_in_child(tree, selection, log.fileno())
        status, until = None, time.monotonic() + LIMIT
        while status is None and time.monotonic() < until:
            done, status_of = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(status_of) if done else None
            time.sleep(0.05)
        names = {0: "passed", 1: "failed"}
        if status is None:
            os.killpg(child, signal.SIGKILL)
            used = os.wait4(child, 0)[2]
            names[None] = "endless" if used.ru_utime + used.ru_stime > BUSY else "stuck"
        log.seek(0)
        return names.get(status, "error"), log.read()


def _run_in_child(tree: Path, selection: str, log: int) -> None:
    status = 70
    try:
        os.setpgid(0, 0)  # so that processes of the tests end with it
        with suppress(AttributeError, OSError):  # elsewhere than on Linux
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends when its worker is ended
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree / "src")
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(tree / "src"))
        status = pytest.main(
            [
                *shlex.split(selection),
                "-x",
                "-q",
                "-W",
                "ignore::pytest.PytestAssertRewriteWarning",
                "-o",
                f"cache_dir={ROOT / '.pytest_cache'}",
                "--no-header",
                "--tb=line",
            ]
        )
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status))


def outcome(guard: Guard) -> tuple[Guard, str, str, float]:
    """(guard, "killed", "survived", "stale", "stuck" or "error", output, seconds), in this worker's copy."""
    began, file = time.perf_counter(), _tree / "src/ygivenx" / guard.module
    source = file.read_text() if file.exists() else ""
    if source.count(guard.old) != 1:
        return guard, "stale", f"{source.count(guard.old)} places in {guard.module} read: {guard.old}", 0.0
    try:
        file.write_text(source.replace(guard.old, guard.new))
        result, output = run_tests(_tree, guard.tests)
    finally:
        file.write_text(source)
    names = {"passed": "survived", "failed": "killed", "endless": "killed"}
    return guard, names.get(result, result), output, time.perf_counter() - began


_tree = Path()


def _own_copy(folder: str) -> None:
    global _tree
    _tree = Path(tempfile.mkdtemp(dir=folder)) / "tree"
    copy_tree(_tree)


def baseline(selection: str) -> tuple[str, str, str]:
    """Without a change the same tests pass, else their failing says nothing."""
    return selection, *run_tests(_tree, selection)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="modules, such as forest.py; by default all")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    guards = [g for g in GUARDS if not args.only or any(g.module.endswith(name) for name in args.only)]
    with (
        tempfile.TemporaryDirectory() as folder,
        get_context("fork").Pool(args.processes, _own_copy, (folder,)) as pool,
    ):
        broken = False
        for selection, result, output in pool.imap(baseline, sorted({g.tests for g in guards})):
            if result != "passed":
                print(f"without a change: {result}: {selection}\n{output[-2000:]}")
                broken = True
        if broken:
            return 1
        found: dict[str, list[bool]] = defaultdict(list)
        wrong = 0
        for guard, result, output, seconds in pool.imap(outcome, guards):
            excused = result == "survived" and guard.survives
            wrong += result != "killed" and not excused
            found[guard.module].append(result == "killed")
            print(f"{result:<9}{seconds:6.1f} s  {guard.module}: {guard.what}", flush=True)
            if excused:
                print(f"          because {guard.survives}")
            elif result != "killed":
                print(f"          {output[-800:].strip()}")
    for module, killed in found.items():
        print(f"{module:<40}{sum(killed):>4} of {len(killed)}")
    few = [m for m, killed in found.items() if sum(killed) < LEAST * len(killed)]
    total = [k for killed in found.values() for k in killed]
    print(
        f"{sum(total)} of {len(total)} guards have a test that trips" + (f"; too few: {few}" if few else "")
    )
    return int(bool(wrong or few))


if __name__ == "__main__":
    sys.exit(main())
