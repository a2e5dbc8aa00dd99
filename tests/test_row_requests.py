"""What a row asks of the loss is done: weights of rows, spans within a reply, replies that are left open."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates.conversations import reply, user
from test_chats import CHATML, encoder, trained

from ygivenx.errors import RowError
from ygivenx.rows.token_rows import OPTIONAL
from ygivenx.rows.weights import MESSAGE_KEYS, ROW_KEYS

SAID = "I'm doing very well, thank you!"


def asked(**keys):
    return {"messages": [user(), {"role": "assistant", "content": SAID, **keys}]}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"spans": [{"start": 9, "stop": 19}]}, " very well<|im_end|>"),
        ({"training_detail": [{"begin_offset": 9, "end_offset": 18, "train": True}]}, " very well<|im_end|>"),
        (
            {"spans": [{"start": 0, "stop": 3, "weight": 0.5}, {"start": 20, "stop": 31}]},
            "I'm thank you!<|im_end|>",
        ),
    ],
)
def test_only_the_characters_of_spans_are_trained(keys, text):
    assert trained(encoder(CHATML)(asked(**keys))) == text


def test_spans_have_weights_and_the_message_another_factor():
    s = encoder(CHATML)(asked(spans=[{"start": 0, "stop": 3, "weight": 0.5}], weight=0.5)).only
    assert {w for t, w in zip(s.tokens, s.weights, strict=True) if t in "I'm"} == {0.25}
    assert s.weights[s.tokens.index("<|im_end|>", 20)] == 0.5


def test_a_token_across_the_border_of_a_span_has_the_smaller_weight(smol_tokenizer):
    from ygivenx import Encoder

    s = Encoder(smol_tokenizer)(asked(spans=[{"start": 11, "stop": 19}])).only  # from within " very"
    assert trained(s) == " well<|im_end|>"
    assert any("smaller weight" in n for n in s.notes)


def test_spans_that_the_template_moves_are_refused():
    written = "{{ m.content }}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
    twice = "{% for m in messages %}" + written + "{% endfor %}"
    with pytest.raises(RowError) as e:
        encoder(twice)(asked(spans=[{"start": 0, "stop": 3}]))
    assert e.value.reason == "spans_unplaced"


def test_spans_count_in_the_content_that_the_row_has_though_the_template_trims_it():
    row = {"messages": [user(), reply("  one two  ", spans=[{"start": 6, "stop": 9}])]}
    assert trained(encoder(CHATML.replace("m['content']", "m['content'] | trim"))(row)) == "two<|im_end|>"


def test_spans_of_the_prompt_count_where_a_policy_trains_it():
    row = {"messages": [user("one two", spans=[{"start": 4, "stop": 7}]), reply("4")]}
    assert trained(encoder(CHATML, train="roles=user")(row)) == "two"


def test_a_rows_weight_multiplies_all_of_it():
    for row in ({"messages": [user(), reply()]}, {"x": "2+2=", "y": "4"}, {"text": "2+2=4"}):
        enc = encoder(CHATML, train="all")
        whole, half = enc(row).only, enc(row | {"weight": 0.5}).only
        assert (whole.weights / 2).tolist() == half.weights.tolist()
    with pytest.raises(RowError, match="no token of this row is trained"):
        encoder(CHATML)({"messages": [user(), reply()], "weight": 0.0})


@pytest.mark.parametrize("row", [asked(prefix=True), asked() | {"continue_final_message": True}])
def test_a_reply_that_is_left_open_has_no_end(row):
    s = encoder(CHATML)(row).only
    assert trained(s) == SAID
    assert "".join(s.tokens).endswith(SAID)


def test_a_completion_goes_on_with_the_prompts_reply():
    begun, rest = reply("It is"), reply(" 4.")
    s = encoder(CHATML)({"prompt": [user(), begun | {"prefix": True}], "completion": [rest]}).only
    assert trained(s) == " 4.<|im_end|>"
    assert "".join(s.tokens).count("assistant") == 1


def test_a_key_that_nobody_reads_is_named():
    s = encoder(CHATML)({"messages": [user(mood="glad"), reply()]}).only
    assert s.notes == ("the message key 'mood' is read by neither the template nor ygivenx",)


def test_a_preference_row_is_refused_as_one():
    _, (rejected,) = encoder(CHATML).batch(
        [{"prompt": [user()], "chosen": [reply()], "rejected": [reply("5")]}]
    )
    assert rejected.reason == "preference_row"
    assert "preference objective" in rejected.message


# --- any row at all --------------------------------------------------------------------------------------

MESSAGES = [[user(), reply()], [user()], [reply()]]
PLAIN = st.sampled_from(
    [None, True, False, 0, 1, 0.5, -1, "", "a", "4", "[1, 2]", float("nan"), 10**30, "\ud800"]
)
ASKED = st.sampled_from(
    [*MESSAGE_KEYS, "spans", "train_detail", "prefix", "tool_calls", "role", "from", "value"]
)
SPANS = st.sampled_from(
    [
        [{"start": 0, "stop": 2}],
        [{"begin_offset": 3, "end_offset": 4, "train": True}],
        [{"type": "text", "text": "a"}],
    ]
)
IDS = st.lists(st.integers(-1, 9), max_size=4)
REPLIES_WITH = st.dictionaries(ASKED, PLAIN | SPANS | IDS, max_size=2).map(
    lambda keys: [user(), reply() | keys]
)
VALUES = st.one_of(PLAIN, st.sampled_from(MESSAGES), IDS, SPANS, REPLIES_WITH)
REQUIRED = st.sampled_from(
    [("messages",), ("prompt", "completion"), ("chosen", "rejected"), ("prompt", "chosen", "rejected"), ("x", "y"),
     ("prompt_ids", "response_ids"), ("input_ids", "labels"), ("input_ids",), ("messages", "rejected_response")]
)  # fmt: skip
FURTHER = st.sampled_from(
    [*ROW_KEYS, *OPTIONAL, "system", "tools", "documents", "continue_final_message", "images"]
)
ENCODERS = [encoder(CHATML), encoder(CHATML, train="all")]


@settings(max_examples=int(os.environ.get("YGX_EXAMPLES", "400")), deadline=None)
@given(st.data(), REQUIRED)
def test_any_row_ends_in_an_example_or_in_our_own_error(data, required):
    row = {c: data.draw(VALUES) for c in required} | data.draw(st.dictionaries(FURTHER, VALUES, max_size=2))
    for enc in ENCODERS:
        with contextlib.suppress(RowError):  # any other error fails
            assert any(s.weights.any() for s in enc(row))
