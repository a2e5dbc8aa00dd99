"""Templates × conversations of every shape: each mask that is given is checked independently."""

from __future__ import annotations

from collections import Counter

import pytest
from templates.checker import NOW, faults, provable
from templates.conversations import MATRIX
from templates.stock import ends_for, stock_templates, tokenizer_for

from ygivenx import Encoder, RowError

TEMPLATES = stock_templates()
STOCK = [n for n in TEMPLATES if not n.endswith("_training")]
# One template of each manner of ending turns, opening thoughts and rewriting history.
SLICE = ["qwen3", "gemma3", "llama3", "glm4moe", "gptoss", "phi3", "deepseek_r1_distill", "qwen3_5_think"]
# Refusals by the contract, as against a template that can't say what the row holds.
CONTRACT = {
    "not_continued", "no_thought", "no_end_of_turn", "no_prompt", "stop_inside", "straddling_token", "no_origins",
    "not_json",
}  # fmt: skip
OF_ROWS = {"control_text", "unknown_part"}
needs_trl = pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")


def encoder_of(name: str) -> Encoder:
    return Encoder(tokenizer_for(name, TEMPLATES[name]), stops=ends_for(name), now=NOW)


def outcome(encoder: Encoder, row: dict, stops: tuple[str, ...]) -> str:
    """What becomes of a row: single, split, or the reason of its refusal; any fault of a mask fails."""
    try:
        example = encoder(row)
    except RowError as e:
        assert str(e).count("\n") >= 1, f"no why or fix: {e}"
        return e.reason
    assert faults(encoder.tokenizer, row, example, stops) == [], str(example)
    return "single" if len(example.sequences) == 1 else "split"


def outcomes(names: list[str]) -> dict[tuple[str, str], str]:
    found = {}
    for name in names:
        encoder = encoder_of(name)
        for title, row in MATRIX.items():
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


def test_there_are_more_than_sixty_conversations():
    assert len(MATRIX) > 60


@needs_trl
def test_a_slice_of_the_matrix():
    kinds = Counter(outcomes(SLICE).values())
    assert kinds["single"] > 350
    assert kinds["split"] > 5
    assert set(kinds) <= CONTRACT | OF_ROWS | {"single", "split", "template_error", "dropped_field"}


@pytest.mark.full
@needs_trl
def test_the_matrix():
    found = outcomes(STOCK)
    shares = summary(found)
    print({k: f"{v:.1%}" for k, v in shares.items()}, len(found), Counter(found.values()))
    assert sum(shares.get(r, 0) for r in CONTRACT) <= 0.08
    assert set(shares) <= CONTRACT | OF_ROWS | {"single", "split", "dropped_field"}


@needs_trl
def test_what_one_rendering_proves_is_never_refused():
    """A row whose replies the template writes as it is, after what inference shows, needs no repair to be encoded."""
    for name in ("qwen3", "llama3", "gemma3"):
        encoder = encoder_of(name)
        for title, row in MATRIX.items():
            if provable(encoder.tokenizer, row, ends_for(name)) == "as it is":
                assert outcome(encoder, row, ends_for(name)) in {"single", "split", *OF_ROWS}, title


EXPECTED = {
    ("qwen3", "reasoning, two turns"): "split",
    ("gptoss", "two turns"): "split",
    ("llama3", "two turns"): "single",
    ("glm4moe", "two turns"): "single",
    ("gemma3", "reasoning"): "dropped_field",
    ("phi3", "a call"): "dropped_field",
    ("deepseek_r1_distill", "one turn"): "single",
    ("deepseek_r1_distill", "reasoning"): "single",
    ("qwen2_5", "spaces around"): "single",
    ("qwen2_5", "begins with the assistant"): "single",
    ("gemma", "with a system prompt"): "template_error",
}


@needs_trl
@pytest.mark.parametrize(("name", "title"), EXPECTED)
def test_known_outcomes(name, title):
    assert outcome(encoder_of(name), MATRIX[title], ends_for(name)) == EXPECTED[name, title]


def changed(example, weights=None, cut=0):
    """An example whose first sequence has other weights, or ids that end earlier."""
    from dataclasses import replace

    first = example.sequences[0]
    stop = len(first) - cut
    segments = tuple(replace(s, stop=min(s.stop, stop)) for s in first.segments if s.start < stop)
    made = replace(
        first,
        ids=first.ids[:stop],
        weights=(first.weights if weights is None else weights)[:stop],
        tokens=first.tokens[:stop],
        segments=segments,
    )
    return replace(example, sequences=(made, *example.sequences[1:]))


@needs_trl
@pytest.mark.parametrize(
    ("mutate", "says"),
    [
        (lambda e: changed(e, cut=2), "isn't one at which generation stops"),
        (
            lambda e: changed(e, weights=(e.weights > -1) * [0, *[1] * (len(e.ids) - 1)]),
            "isn't output is trained",
        ),
        (lambda e: changed(e, weights=e.weights * 0), "reply 1 isn't trained"),
    ],
)
def test_the_checker_finds_what_is_wrong(mutate, says):
    encoder, row = encoder_of("llama3"), MATRIX["one turn"]
    assert says in " ".join(faults(encoder.tokenizer, row, mutate(encoder(row)), ends_for("llama3")))


@needs_trl
def test_the_checker_finds_a_text_that_another_row_has():
    encoder, row = encoder_of("llama3"), MATRIX["two turns"]
    other = {"messages": [*row["messages"][:3], {"role": "assistant", "content": "7"}]}
    found = " ".join(faults(encoder.tokenizer, other, encoder(row), ends_for("llama3")))
    assert "it lacks '7'" in found
    other = {"messages": [{"role": "user", "content": "What is 2 + 3?"}, *row["messages"][1:]]}
    found = " ".join(faults(encoder.tokenizer, other, encoder(row), ends_for("llama3")))
    assert "message 0 (user) isn't in the context" in found
    assert "isn't what inference shows" in found
