"""The optional compiled kernel behind `fused.py`: built from `kernel.cpp` on first use, kept in the user's cache.

Nothing happens at import. Where it can't be built or can't run, torch does the same work: `why_not()` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .edges import ColumnSums
from .gradients import Gradients
from .logit_head import LogitHead
from .tiles import Marks, Scratch

SOURCE = Path(__file__).with_name("kernel.cpp")
SWITCH = "YGIVENX_KERNEL"  # set to 0 to do without
BUILD_SECONDS = 60
WIDTH = 64  # columns that lie together, as in `kernel.cpp`
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
    # Compilers prefer half vectors for AVX-512, which took 1.2 to 1.7 times as long here.
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)


def usable(head: LogitHead) -> bool:
    """Whether the kernel runs for this head; builds it if need be.

    The vectors of `kernel.cpp` read pairs of hidden values, rows without gaps, and apply no cap. Each condition is
    cheaper than the next: the kernel is built last, when nothing else is in its way.
    """
    weight = head.weight
    fits = weight.device.type == "cpu" and weight.dtype in NAMES and weight.shape[1] % 2 == 0
    fast = weight.dtype == torch.bfloat16 or fast_float32()
    return fits and fast and weight.is_contiguous() and head.softcap is None and library() is not None


def fast_float32() -> bool:
    """Whether six bfloat16 products take no longer than a float32 one: so it is on matrix units."""
    # Older releases of torch can't tell: then it isn't.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for the kernel, whatever torch's default dtype and device are."""
    return torch.zeros(*shape, dtype=dtype, device="cpu")


def library() -> ctypes.CDLL | None:
    """The loaded kernel, or None."""
    return _loaded()[0] if os.environ.get(SWITCH) != "0" else None


def why_not() -> str:
    """Why there is no kernel; empty if there is one."""
    return f"{SWITCH}=0" if os.environ.get(SWITCH) == "0" else _loaded()[1]


def bytes_of_column(weight: Tensor) -> int:
    """Bytes of one packed row of hidden states: a float32 number is three of bfloat16."""
    return 2 * _planes(weight.dtype) * weight.shape[1]


def _planes(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bfloat16 else 3


class SweepInput:
    """What both sweeps read: the head, and `columns` columns from `start` on, with shift and targets."""

    def __init__(self, head: LogitHead, start: int, columns: int, shift: Tensor, targets: Marks) -> None:
        self.weight, self.start, self.columns = head.weight, start, columns
        bias = None if head.bias is None else head.bias.float().contiguous()
        self.arguments = (columns, shift, bias, float(head.scale),
                          targets.token, targets.column, len(targets.token))  # fmt: skip


class Columns:
    """Rows of hidden states, padded with zeros to `columns`, as the matrix kernels read them."""

    def __init__(self, hidden: Tensor, rows: Tensor, columns: int, scratch: Scratch) -> None:
        self.hidden, self.rows, self.columns, self.scratch = hidden, rows, columns, scratch
        self.name, self.size = NAMES[hidden.dtype], hidden.shape[1]
        self.x = self._pack("x", None)

    def _pack(self, name: str, factor: Tensor | None) -> Tensor:
        """For logits, or times `factor` for dW."""
        width = self.size * _planes(self.hidden.dtype)
        packed = self.scratch.view(name, self.columns, width, torch.bfloat16)
        places = (packed, None) if factor is None else (None, packed)
        sizes = len(self.rows), self.columns, self.size
        _call(f"ygx_pack_{self.name}", self.hidden, self.rows, *sizes, factor, *places)
        return packed

    def first_sweep(self, tiles: SweepInput, into: ColumnSums, *, product: bool) -> Tensor | None:
        """Add to the sums of the columns; returns Σ e[v]·W[v] float32 [columns, H] with `product`.

        The next call overwrites that. Threads share out the columns, in groups of some width, and then the vocabulary.
        """
        threads, n = torch.get_num_threads(), tiles.columns
        # A group has at least 4 * WIDTH columns. Threads beyond the groups share out the vocabulary, and what they
        # sum up is added below.
        groups = max(1, min(threads, n // (4 * WIDTH)))
        parts = threads // groups
        sums, above = zeros(parts, n, dtype=torch.float64), zeros(parts, n, dtype=torch.int64)
        moments = None if into.moments is None else torch.zeros_like(sums)
        total = None
        if product:
            total = self.scratch.view("total", parts, n * self.size, torch.float32).zero_()
        self._call("first", tiles, groups, parts, sums, moments, above, total)
        into.e += sums.sum(0)
        if into.moments is not None and moments is not None:
            into.moments += moments.sum(0)
        if into.above is not None:
            into.above += above.sum(0)
        if total is not None:
            total = (total.sum(0) if parts > 1 else total).view(n, self.size)
        return total

    def second_sweep(
        self, tiles: SweepInput, factor: Tensor, held: Marks, into: Gradients, *, add: bool
    ) -> None:
        """dW and the bias's gradient, written or, with `add`, added to."""
        weight = torch.empty_like(tiles.weight) if into.weight is None else into.weight
        self._call("second", tiles, self._pack("y", factor), factor, held.token, held.column, held.value.float(),
                   len(held.token), weight, into.bias, int(add))  # fmt: skip

    def _call(self, sweep: str, tiles: SweepInput, *more: Tensor | int | None) -> None:
        weight, x = tiles.weight, self.x[tiles.start :]
        _call(f"ygx_{sweep}_{self.name}", weight, *weight.shape, x, *tiles.arguments, *more)


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    loaded = library()
    assert loaded is not None
    getattr(loaded, name)(*map(_c, arguments))


def _c(value: Tensor | int | float | None) -> object:
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_void_p(0 if value is None else value.data_ptr())


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    if sys.platform != "linux":
        return None, f"it is for Linux, not {sys.platform}"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None, "there is no C++ compiler (g++, c++ or $CXX)"
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except subprocess.TimeoutExpired:
        return None, f"{compiler} took more than {BUILD_SECONDS} s"
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed: {(error.stderr or '').strip()[-300:]}"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return None, f"it can't be built or loaded: {error}"
    loaded.ygx_usable.restype = ctypes.c_bool
    return (
        (loaded, "") if loaded.ygx_usable() else (None, "torch has no small bfloat16 products for this CPU")
    )


def _built(compiler: str) -> Path:
    """The shared library for this source, compiler, torch and CPU, compiled if it isn't in the cache yet."""
    torch_lib = Path(torch.__file__).parent / "lib"
    ingredients = "\n".join((SOURCE.read_text(), compiler, *FLAGS, torch.__version__, str(torch_lib), _cpu()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ygivenx"
    target = cache / f"head-{hashlib.sha256(ingredients.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / target.name
        linked = (f"-L{torch_lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_lib}")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built), *linked]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        built.replace(target)  # another process may have written the same file
    return target


def _cpu() -> str:
    """What -march=native depends on: a home directory may serve several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
