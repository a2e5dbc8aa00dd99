"""Properties of masks over conversations that hypothesis makes; YGIVENX_EXAMPLES sets how many (default 60)."""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates.checker import NOW, faults
from templates.conversations import call
from templates.stock import ends_for, stock_templates, tokenizer_for

from ygivenx import Encoder, RowError
from ygivenx.errors import YgivenxError
from ygivenx.rows.formats import normalise
from ygivenx.templating.origins import Text, join_texts
from ygivenx.templating.writing import percent

SHELF = stock_templates()
TEMPLATES = [
    n for n in ("qwen3", "llama3_1", "gemma3", "glm4moe", "gptoss", "phi3", "qwen3_5_think") if n in SHELF
]
pytestmark = pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")
many = settings(
    max_examples=int(os.environ.get("YGIVENX_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="YGIVENX_EXAMPLES" not in os.environ,
)

CONTROL = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|user|>",
    "<|end|>",
    "<|return|>",
]
words = st.sampled_from(
    [
        "a",
        " b",
        "\n",
        "\n\n",
        "  ",
        "42",
        "é",
        "你",
        "👩‍👩‍👧",
        "<think>",
        "</think>",
        "<|",
        "|>",
        "{{",
        "user",
    ]
)
plain = st.lists(words, max_size=6).map("".join)
hostile = st.lists(st.one_of(words, st.sampled_from([*CONTROL, "<|im_", "end|>", "_id|>"])), max_size=6).map(
    "".join
)


def messages(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    user = st.builds(lambda t: {"role": "user", "content": t}, texts)
    reply = st.builds(lambda t: {"role": "assistant", "content": t}, texts)
    thinking = st.builds(
        lambda t, r: {"role": "assistant", "content": t, "reasoning_content": r}, texts, texts
    )
    calling = st.builds(
        lambda n, v: {"role": "assistant", "content": "", "tool_calls": [call(n, {"k": v})]}, texts, texts
    )
    result = st.builds(lambda t: {"role": "tool", "content": t, "name": "f"}, texts)
    turn = st.one_of(
        st.tuples(user, reply),
        st.tuples(user, thinking),
        st.tuples(user, calling, result, reply),
        st.tuples(user, user, reply),
    )
    system = st.one_of(st.just(()), st.builds(lambda t: ({"role": "system", "content": t},), texts))
    turns = st.lists(turn, min_size=1, max_size=3).map(lambda ts: [m for t in ts for m in t])
    return st.tuples(system, turns).map(lambda st_: [*st_[0], *st_[1]])


@lru_cache
def encoder(name: str, control: str) -> Encoder:
    return Encoder(tokenizer_for(name, SHELF[name]), control=control, stops=ends_for(name), now=NOW)


@many
@given(name=st.sampled_from(TEMPLATES), row=messages(plain))
def test_every_mask_given_keeps_the_contract(name, row):
    enc = encoder(name, "parse")
    try:
        example = enc({"messages": row})
    except RowError:
        return
    normal = {"messages": normalise({"messages": row}).messages}
    assert faults(enc.tokenizer, normal, example, ends_for(name)) == []


@many
@given(name=st.sampled_from(TEMPLATES), row=messages(hostile))
def test_text_never_becomes_control(name, row):
    """With control="text" the control tokens are those of the template, as many as with neutral words."""
    enc = encoder(name, "text")
    try:
        example = enc({"messages": row})
        neutral = enc({"messages": _neutral(row)})
    except RowError:
        return
    special = set(enc.tokens.special.values())
    if len(example.sequences) == len(neutral.sequences):
        for one, other in zip(example, neutral, strict=True):
            assert [i for i in one.ids.tolist() if i in special] == [
                i for i in other.ids.tolist() if i in special
            ]
    for sequence in example:
        assert not (sequence.weights[~sequence.output] > 0).any()


def _neutral(row: list[dict]) -> list[dict]:
    """The same shape with words that hold no piece of a control token."""

    def calm(text: str) -> str:
        for token in [*CONTROL, "<|im_", "end|>", "_id|>", "<|", "|>"]:
            text = text.replace(token, "w")
        return text

    def walk(value):
        if isinstance(value, str):
            return calm(value)
        if isinstance(value, dict):
            return {k: v if k in ("role", "type") else walk(v) for k, v in value.items()}
        return [walk(v) for v in value] if isinstance(value, list) else value

    return walk(row)


@many
@given(name=st.sampled_from(TEMPLATES), row=messages(hostile))
def test_refusing_leaves_no_control_of_the_rows(name, row):
    enc = encoder(name, "refuse")
    examples, rejected = enc.batch([{"messages": row}])
    assert len(examples) + len(rejected) == 1
    for r in rejected:
        assert r.reason
        assert r.where


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@many
@given(
    row=st.dictionaries(
        st.sampled_from(["messages", "prompt", "completion", "x", "y", "tools", "text"]), json_values
    )
)
def test_whatever_a_row_is_the_error_is_ours(row):
    examples, rejected = encoder(TEMPLATES[0], "refuse").batch([row])
    assert len(examples) + len(rejected) == 1


@many
@given(st.lists(st.tuples(st.text(max_size=4), st.integers(0, 3)), max_size=5), st.data())
def test_texts_do_what_strings_do_and_keep_their_sources(parts, data):
    text = join_texts([Text.of(t, s) for t, s in parts])
    plain = "".join(t for t, _ in parts)
    owners = [s for t, s in parts for _ in t]
    a, b = data.draw(st.integers(-6, 22)), data.draw(st.integers(-6, 22))
    sep = data.draw(st.sampled_from([None, "a", " ", "0", "ab"]))
    cut = text[a:b]
    assert (str.__str__(cut), _owners(cut)) == (plain[a:b], owners[a:b])
    for made, expected in (
        (text.strip(sep), plain.strip(sep)),
        (text[::-1], plain[::-1]),
        (text.replace("a", "bb"), plain.replace("a", "bb")),
        ("-" + text * 2 + "+", "-" + plain * 2 + "+"),
        (percent("%s|%s", (text, text)), f"{plain}|{plain}"),
        (Text.of("-", 0).join(text.split(sep)), "-".join(plain.split(sep))),
        (Text.of("-", 0).join(text.rsplit(sep, 1)), "-".join(plain.rsplit(sep, 1))),
        (Text.of("-", 0).join(text.partition("a")), "-".join(plain.partition("a"))),
        (Text.of("-", 0).join(text.splitlines()), "-".join(plain.splitlines())),
    ):
        assert str.__str__(made) == expected
        assert len(_owners(made)) == len(made)
    stripped = text.lstrip()
    assert _owners(stripped) == owners[len(owners) - len(stripped) :]


def _owners(text: Text) -> list[int]:
    found, at = [], 0
    for stop, source in text.runs:
        found += [source] * (stop - at)
        at = stop
    return found


def test_errors_are_ours():
    assert issubclass(RowError, YgivenxError)
