"""The memory of this process: how much there is, the most that it held, and keeping what is freed for what comes."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from ..head.pages import ask_for_large_pages

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
UNKNOWN = 8 << 30  # bytes, where a system doesn't say how many it has


def peak() -> int:
    """Bytes: the most that this process has held so far, on the GPU where there is one; 0 where that can't be known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # it has no getrusage
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total(device: torch.device) -> int:
    """Bytes that a device has; of the host's memory what this process may use, 8 GiB where that can't be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([_physical(), *_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _physical() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and others not these names
        return UNKNOWN


def _limits(own: Path, root: Path) -> Iterator[int]:
    """Limits in bytes of the control groups that a process is in, by `own`, and of those above: containers, jobs."""
    groups = own.read_text().splitlines() if own.exists() else []
    for number, controllers, path in (line.split(":", 2) for line in groups):
        if number == "0":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for place in (group, *group.parents):
            file = place / name
            if place.is_relative_to(top) and file.exists() and (limit := file.read_text().strip()).isdigit():
                yield int(limit)


@cache
def keep_freed_memory() -> bool:
    """From here on this process keeps the memory that it frees, on large pages; whether that could be done.

    glibc gives every large block back to the kernel, so that the next layer's tensors come as new pages, each
    with a fault and filled with zeros: a good part of a step on a CPU. GPUs don't need it; torch keeps their memory
    anyway. The price: the process doesn't shrink below its peak any more. It is done once, on Linux with glibc,
    and not where the environment already says something about the allocator (MALLOC_*, GLIBC_TUNABLES, LD_PRELOAD).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or _settled_by_environment():
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)):
        return False
    # Addresses, not memory: what is freed here is what all later blocks are cut from, and pages come when touched.
    size = total(torch.device("cpu")) // 2
    block = libc.malloc(size)
    if block:  # a limit on addresses may forbid it; freed memory is kept all the same
        # Also where a balloon takes free large pages back: these are never free again.
        ask_for_large_pages(block, size)
        libc.free(block)
    return True


def _settled_by_environment() -> bool:
    return any(n.startswith("MALLOC_") or n in ("GLIBC_TUNABLES", "LD_PRELOAD") for n in os.environ)
