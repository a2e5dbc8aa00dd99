"""The optional compiled tile of `sweep.py`: built from `kernel.cpp` on first use, kept in the user's cache.

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
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
SWITCH = "YGIVENX_KERNEL"  # set to 0 to do without
BUILD_SECONDS = 60
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


def usable(weight: Tensor) -> bool:
    """Whether the kernel runs for this head; builds it if need be."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    return fits and weight.is_contiguous() and library() is not None


def library() -> ctypes.CDLL | None:
    """The loaded kernel, or None."""
    return _loaded()[0] if os.environ.get(SWITCH) != "0" else None


def why_not() -> str:
    """Why there is no kernel; empty if there is one."""
    return f"{SWITCH}=0" if os.environ.get(SWITCH) == "0" else _loaded()[1]


class Packed:
    """Columns of hidden states in the order in which the matrix kernels read them. bfloat16 [columns, H]."""

    def __init__(self, x: Tensor) -> None:
        self.columns, self.size = x.shape
        self.x = torch.empty_like(x)
        _call("ygx_pack", x, self.columns, self.size, self.x)

    def exponentials(
        self, weight: Tensor, out: Tensor, shift: Tensor, bias: Tensor | None, scale: float,
        marks: tuple[Tensor, Tensor], sums: Tensor, above: Tensor,
    ) -> None:  # fmt: skip
        """One tile: see `kernel.cpp`. marks: tokens of the tile, ascending, and their columns."""
        _call(
            "ygx_exponentials", weight, len(weight), self.size, self.x, self.columns, out, out.stride(0), shift,
            bias, scale, *marks, len(marks[0]), sums, above,
        )  # fmt: skip


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
    made_of = "\n".join((SOURCE.read_text(), compiler, *FLAGS, torch.__version__, str(torch_lib), _cpu()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ygivenx"
    target = cache / f"head-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / target.name
        linked = (f"-L{torch_lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_lib}")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made), *linked]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        made.replace(target)  # another process may have made the same file
    return target


def _cpu() -> str:
    """What -march=native depends on: a home directory may serve several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
