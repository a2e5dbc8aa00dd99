"""Real vocabularies: the tokenizers' own templates, and TRL's of current models, fetched by `make tokenizers`."""

from __future__ import annotations

from collections import Counter

import pytest
from templates.checker import NOW
from templates.conversations import MATRIX
from templates.real import family_of, is_there, real_tokenizer, stops_of, tokenizer_of
from templates.stock import ends_for, stock_templates
from test_matrix import CONTRACT, OF_ROWS, outcome

from ygivenx import Encoder

NAMES = ("qwen3", "llama3", "llama3_1", "gemma3", "deepseek_v3", "gptoss")
MODELS = (
    "qwen3_5_think",
    "qwen3_8",
    "nemotron_3_nano",
    "gemma4_v5",
    "glm4moe",
    "gptoss",
    "lfm2_2_5",
    "cohere2",
)
KNOWN = CONTRACT | OF_ROWS | {"single", "split", "template_error", "dropped_field"}


def checked(tokenizer, stops) -> Counter[str]:
    encoder = Encoder(tokenizer, stops=stops, now=NOW)
    return Counter(outcome(encoder, row, stops) for row in MATRIX.values())


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers(name):
    tokenizer = tokenizer_of(name)
    found = checked(tokenizer, stops_of(name, tokenizer))
    assert found["single"] + found["split"] >= 25
    assert set(found) <= KNOWN


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_models_of_today(name):
    template = stock_templates().get(name)
    family = family_of(name, template) if template else None
    if family is None or not is_there(family):
        pytest.skip("needs TRL, and make tokenizers")
    found = checked(real_tokenizer(name, template, family), family.stops)
    print(name, dict(found))
    assert found["single"] + found["split"] >= 35
    assert set(found) <= KNOWN


@pytest.mark.model
def test_the_real_models_tokenizer(smol_tokenizer):
    found = checked(smol_tokenizer, ends_for("smollm2"))
    assert found["single"] >= 30
