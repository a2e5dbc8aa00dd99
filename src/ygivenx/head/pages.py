"""Large tensors on large pages: a gradient of the head is written once, and small pages cost as much as that."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from mmap import PAGESIZE
from pathlib import Path

import torch
from torch import Tensor

LARGE_BYTES = 8 << 20  # from here on asking is worth its call
MADV_HUGEPAGE = 14  # linux/mman.h
BALLOON, REPORTS = "0x0005", 5  # virtio 1.2, 5.5: the device, and its feature "free page reporting"


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; on Linux a large CPU tensor asks for huge pages, which the kernel may grant or not."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if (
        device.type == "cpu"
        and tensor.nbytes >= LARGE_BYTES
        and sys.platform == "linux"
        and not returns_free_pages()
    ):
        ask_for_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def ask_for_large_pages(address: int, size: int) -> None:
    """On Linux: ask for large pages in these bytes. A hint, whose refusal (EINVAL) changes nothing but time."""
    start, stop = -(-address // PAGESIZE) * PAGESIZE, (address + size) // PAGESIZE * PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_HUGEPAGE)


@lru_cache(maxsize=1)
def returns_free_pages(devices: str = "/sys/bus/virtio/devices") -> bool:
    """Whether this virtual machine gives free large pages back to its host: their next use costs the host's faults,
    which is several times what small pages cost.
    """
    return any(_reports(device) for device in Path(devices).glob("*"))


def _reports(device: Path) -> bool:
    try:
        kind, features = ((device / name).read_text().strip() for name in ("device", "features"))
    except OSError:
        return False
    return kind == BALLOON and features[REPORTS : REPORTS + 1] == "1"
