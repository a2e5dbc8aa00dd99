"""Every template that TRL ships × conversations of every shape: each mask given is checked independently."""

from __future__ import annotations

from collections import Counter

import pytest
from templates.checker import faults
from templates.conversations import ALL
from templates.stock import ends_for, stock_templates, tokenizer_for

from ygivenx import Encoder, RowError
from ygivenx.rows.formats import normalise

TEMPLATES = stock_templates()
STOCK = [n for n in TEMPLATES if not n.endswith("_training")]
# One template of each manner of ending turns, opening thoughts and rewriting history.
SLICE = [
    "qwen3",
    "gemma3",
    "llama3",
    "glm4moe",
    "gptoss",
    "phi3",
    "deepseek_r1_distill",
    "qwen3_5_think",
    "smolvlm",
]
# Refusals by the contract, as against a template that can't say what the row holds.
CONTRACT = {"not_continued", "no_end_of_turn", "no_prompt", "stop_inside", "straddling_token", "no_origins"}


def outcome(encoder: Encoder, row: dict, ends: tuple[str, ...]) -> str:
    """What becomes of a row: single, split, or the reason of its refusal; any fault of a mask fails."""
    try:
        example = encoder(row)
    except RowError as e:
        assert str(e).count("\n") >= 1, f"no why or fix: {e}"
        return e.reason
    normal = {**row, "messages": normalise(row).messages}
    assert faults(encoder.tokenizer, normal, example, ends) == [], str(example)
    return "single" if len(example.sequences) == 1 else "split"


def outcomes(names: list[str]) -> dict[tuple[str, str], str]:
    found = {}
    for name in names:
        encoder = Encoder(tokenizer_for(name, TEMPLATES[name]))
        for title, row in ALL.items():
            try:
                found[name, title] = outcome(encoder, row, ends_for(name))
            except AssertionError as e:
                raise AssertionError(f"{name} × {title}: {e}") from e
    return found


def summary(found: dict[tuple[str, str], str]) -> dict[str, float]:
    """Shares of what the templates render."""
    counts = Counter(found.values())
    rendered = len(found) - counts.pop("template_error", 0)
    return {k: v / rendered for k, v in counts.most_common()}


def test_at_least_forty_conversations():
    assert len(ALL) >= 40


@pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")
def test_a_slice_of_the_matrix():
    found = outcomes(SLICE)
    kinds = Counter(found.values())
    assert kinds["single"] > 300
    assert kinds["split"] > 5
    assert set(kinds) <= CONTRACT | {"single", "split", "template_error", "dropped_field"}


@pytest.mark.full
@pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")
def test_the_matrix(record_property):
    found = outcomes(STOCK)
    shares = summary(found)
    print({k: f"{v:.1%}" for k, v in shares.items()}, len(found), Counter(found.values()))
    assert sum(shares.get(r, 0) for r in CONTRACT) <= 0.08
    assert set(shares) <= CONTRACT | {"single", "split", "dropped_field"}


EXPECTED = {
    ("qwen3", "reasoning, two turns"): "split",
    ("gptoss", "two turns"): "split",
    ("llama3", "two turns"): "single",
    ("glm4moe", "two turns"): "single",
    ("gemma3", "reasoning"): "dropped_field",
    ("phi3", "a call"): "dropped_field",
    ("deepseek_r1_distill", "one turn"): "not_continued",
    ("deepseek_r1_distill", "reasoning"): "single",
    ("qwen2_5", "spaces around"): "straddling_token",
    ("qwen2_5", "begins with the assistant"): "single",
    ("gemma", "with a system prompt"): "template_error",
}


@pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")
@pytest.mark.parametrize(("name", "title"), EXPECTED)
def test_known_outcomes(name, title):
    assert (
        outcome(Encoder(tokenizer_for(name, TEMPLATES[name])), ALL[title], ends_for(name))
        == EXPECTED[name, title]
    )
