"""Freed memory is kept, in real processes: page faults tell."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ygivenx.models import memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators keep it by themselves"
)

PROGRAM = """
import resource, sys, threading
import torch
import ygivenx as yx

kept = yx.keep_freed_memory() if "keep" in sys.argv else None
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    tensors = [torch.ones(size, dtype=torch.uint8) for size in (90 << 20, 5 << 20, 12 << 20)]
    del tensors

step()
before = faults()
for _ in range(4):
    step()
thread = threading.Thread(target=step)  # another thread has no room for 90 MB of its own in the heap
spent = faults() - before
thread.start(), thread.join()
print(kept, spent)
"""


def run(*arguments: str, **environment: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=clean | environment, text=True, check=True, capture_output=True
    )  # fmt: skip
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_what_is_freed_comes_back_without_faults():
    kept, faults = run("keep")
    assert (kept, faults < run()[1] / 2) == ("True", True)  # an interpreter has some of its own


def test_without_it_every_step_pays_again():
    """Else the test above could not fail. 107 MB in pages of 4 KiB, four times; large pages would make it fewer."""
    assert run()[1] > 200


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_whoever_has_set_the_allocator_keeps_it_so(name):
    value = "1" if name.startswith("MALLOC") else "glibc.malloc.arena_max=1"
    assert run("keep", **{name: value})[0] == "False"


def test_peak_grows_with_what_is_held():
    before = memory.peak()
    held = bytearray(os.urandom(1)) * (memory.peak() + (64 << 20))
    assert memory.peak() - before > 32 << 20
    del held
