"""Real tokenizers with their own templates, fetched by `make tokenizers`: ids equal, every mask checked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from templates.conversations import ALL
from templates.stock import ends_for
from test_matrix import CONTRACT, outcome
from transformers import AutoTokenizer

from ygivenx import Encoder

FETCHED = Path(__file__).resolve().parents[1] / ".tokenizers"
NAMES = ("qwen3", "llama3", "llama3_1", "gemma3", "deepseek_v3")
# Tokens that end a turn and aren't the tokenizer's eos; a model's generation config names them.
STOPS = {"llama3": ["<|eot_id|>"], "llama3_1": ["<|eot_id|>"], "gemma3": ["<end_of_turn>"]}


def tokenizer_of(name: str):
    if not (FETCHED / name / "tokenizer.json").is_file():
        pytest.skip("not fetched: make tokenizers")
    return AutoTokenizer.from_pretrained(FETCHED / name)


def checked(tokenizer, name: str) -> Counter[str]:
    encoder = Encoder(tokenizer, stops=STOPS.get(name, ()))
    return Counter(outcome(encoder, row, ends_for(name)) for row in ALL.values())


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers(name):
    found = checked(tokenizer_of(name), name)
    print(name, dict(found))
    assert found["single"] + found["split"] >= 25
    assert set(found) <= CONTRACT | {"single", "split", "template_error", "dropped_field", "control_text"}


@pytest.mark.model
def test_the_real_models_tokenizer(smol_tokenizer):
    found = checked(smol_tokenizer, "smollm2")
    assert found["single"] >= 30
