"""Large tensors on large pages: a gradient of the head is written once, and small pages cost as much as that."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

SMALL_PAGE = 4096
LARGE = 8 << 20  # bytes from which asking is worthwhile
MADV_HUGEPAGE = 14  # linux/mman.h


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; on Linux a large CPU tensor asks for huge pages, which the kernel may grant or not."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if sys.platform == "linux" and device.type == "cpu" and tensor.nbytes >= LARGE:
        start = -(-tensor.data_ptr() // SMALL_PAGE) * SMALL_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // SMALL_PAGE * SMALL_PAGE
        # A hint: a refusal (EINVAL without support) changes nothing but time.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return tensor
