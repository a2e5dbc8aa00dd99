"""Freed memory is kept, in real processes: page faults tell."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

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


@pytest.mark.full
def test_without_it_every_step_pays_again():
    """Else the test above could not fail. 107 MB in pages of 4 KiB, four times; large pages would make it fewer."""
    assert run()[1] > 200


@pytest.mark.full
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_whoever_has_set_the_allocator_keeps_it_so(name):
    value = "1" if name.startswith("MALLOC") else "glibc.malloc.arena_max=1"
    assert run("keep", **{name: value})[0] == "False"


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/", {"memory.max": "1000"}, [1000]),
        (
            "0::/job/step",
            {"job/step/memory.max": "max", "job/memory.max": "700", "memory.max": "900"},
            [700, 900],
        ),
        ("4:cpu:/\n3:memory:/docker/1", {"memory/memory.limit_in_bytes": "500", "memory.max": "1"}, [500]),
        ("0::/elsewhere", {}, []),
        (None, {}, []),
    ],
)
def test_a_container_s_limit_counts(groups, files, limits, tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    if groups is not None:
        own.write_text(groups)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert list(memory._limits(own, root)) == limits


def test_memory_is_told_without_sysconf(monkeypatch):
    cpu = torch.device("cpu")
    assert 0 < memory.total(cpu) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "_limits", lambda own, root: [5])
    assert memory.total(cpu) == 5
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(memory, "_limits", lambda own, root: [])
    assert memory.total(cpu) == memory.UNKNOWN


def test_peak_grows_with_what_is_held():
    before = memory.peak()
    held = bytearray(os.urandom(1)) * (memory.peak() + (64 << 20))
    assert memory.peak() - before > 32 << 20
    del held
