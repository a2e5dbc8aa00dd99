"""What a row becomes: formats by columns, messages as templates read them, faults with their field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ygivenx.errors import ConfigError, DataError, RowError
from ygivenx.rows.data import Conversation, Pair, Preference, normalise
from ygivenx.rows.formats import FORMATS, recognise
from ygivenx.rows.messages import unread_keys

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
DETAIL = {"begin_offset": 0, "end_offset": 0}  # without `train`
HUMAN, GPT = {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}
PLAIN = Conversation((USER, REPLY))


def nested(depth: int) -> list:
    """[[...]] with so many brackets."""
    return [nested(depth - 1)] if depth > 1 else []


def calling(arguments: dict) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": arguments}]}


@pytest.mark.parametrize(
    ("row", "noun"),
    [
        ({"messages": [USER, REPLY]}, PLAIN),
        ({"messages": json.dumps([USER, REPLY])}, PLAIN),
        ({"messages": [USER, REPLY], "text": "rendered", "id": 7}, PLAIN),
        ({"conversations": [HUMAN, GPT]}, PLAIN),
        ({"conversations": [USER, REPLY]}, PLAIN),
        ({"messages": [HUMAN, GPT]}, PLAIN),
        ({"question": "2+2?", "answer": "4"}, PLAIN),
        ({"instruction": "2+2?", "input": "", "output": "4", "history": None}, PLAIN),
        ({"prompt": [USER], "completion": [REPLY]}, PLAIN),
        ({"prompt": "2+2=", "completion": "4"}, Pair("2+2=", "4")),
        ({"prompt": "2+2=", "response": "4"}, Pair("2+2=", "4")),
        ({"query": "2+2?", "response": "4", "history": []}, PLAIN),
        ({"x": "2+2=", "y": "4"}, Pair("2+2=", "4")),
        ({"text": "2+2=4"}, Pair("", "2+2=4")),
    ],
)
def test_every_format_by_its_columns(row, noun):
    assert normalise(row) == noun


def test_alpaca_joins_input_history_and_system():
    row = {"instruction": "add", "input": "2 2", "output": "4", "system": "s", "history": [["a", "b"]]}
    assert [(m["role"], m["content"]) for m in normalise(row).messages] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "add\n2 2"), ("assistant", "4"),
    ]  # fmt: skip


def test_named_columns_are_a_conversation_or_as_text_a_pair():
    row = {"task": "2+2?", "solution": "4"}
    assert normalise(row, columns=("task", "solution")) == PLAIN
    assert normalise(row, columns=("task", "solution"), as_text=True) == Pair("2+2?", "4")


def test_a_question_has_what_templates_read():
    row = {"question": "2+2?", "answer": "4", "tools": [{"name": "add"}], "continue_final_message": True}
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert normalise(row) == Conversation((USER, REPLY), tools, continue_final_message=True)
    named = normalise({"tools": "2+2?", "answer": "4"}, columns=("tools", "answer"))
    assert named == PLAIN, "a column that is x is nothing else"


def test_replies_inside_a_prompt_are_context():
    noun = normalise({"prompt": [USER, REPLY, USER], "completion": [REPLY]})
    assert [m.get("weight") for m in noun.messages] == [None, 0.0, None, None]


def test_sharegpt_calls_roles_tools_and_system():
    row = {
        "conversations": [
            HUMAN,
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            GPT | {"weight": 0.5},
        ],
        "tools": '[{"name": "add", "parameters": {}}]',
        "system": "s",
    }
    noun = normalise(row)
    assert [m["role"] for m in noun.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert noun.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert noun.messages[4]["weight"] == 0.5
    assert noun.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_parallel_sharegpt_calls():
    value = json.dumps([CALL["function"], CALL["function"]])
    noun = normalise({"conversations": [HUMAN, {"from": "function_call", "value": value}]})
    assert noun.messages[1]["tool_calls"] == [CALL, CALL]


def test_typed_parts_become_fields():
    parts = [
        {"type": "reasoning", "value": "think"},
        {"type": "text", "text": "so "},
        {"type": "text", "value": "be it"},
        {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
    ]
    message = normalise(
        {"messages": [USER, {"role": "assistant", "content": parts, "loss_weight": 1}]}
    ).messages[1]
    fields = {"reasoning_content": "think", "content": "so be it", "tool_calls": [CALL], "weight": 1.0}
    assert message == {"role": "assistant"} | fields


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "add", "arguments": {"a": 2}},
        {"function": {"name": "add", "arguments": '{"a": 2}'}},
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}, "id": None},
    ],
)
def test_calls_in_all_their_forms(call):
    # No content, and nulls from a columnar file, beside a call.
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call], "name": None}]}
    assert normalise(row).messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_openais_older_calls():
    row = {
        "messages": [
            USER,
            {"role": "assistant", "function_call": CALL["function"]},
            {"role": "function", "content": "4"},
        ]
    }
    noun = normalise(row)
    assert noun.messages[1]["tool_calls"] == [CALL]
    assert noun.messages[2]["role"] == "tool"


def test_openais_older_functions():
    row = {"messages": [USER], "functions": [{"name": "add", "parameters": {}}]}
    assert normalise(row).tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"weight": 0}, 0.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"loss_scale": 2.0}, 2.0),
        ({"train": True}, 1.0),
        ({"training": False, "weight": 0}, 0.0),
        ({"trainable": False}, 0.0),
        ({"learnable": 1}, 1.0),
        ({"loss": False}, 0.0),
        ({"loss_mask": 0}, 0.0),
        ({"loss_mask": 1.0}, 1.0),
        ({"mask": True}, 0.0),
        ({"masked": False}, 1.0),
        ({"loss": None, "weight": 0.5}, 0.5),
    ],
)
def test_weights_under_every_name(keys, weight):
    message = normalise({"messages": [USER, REPLY | keys]}).messages[1]
    assert message == REPLY | {"weight": weight}


@pytest.mark.parametrize(
    ("columns", "weight"),
    [({"weight": 0.0}, 0.0), ({"loss_weight": "0.5"}, 0.5), ({"sample_weight": 2}, 2.0), ({"train": False}, 0.0),
     ({"loss": 2.31}, 1.0), ({"loss": "2.31"}, 1.0), ({"masked": True}, 0.0), ({"weight": None, "train": "true"}, 1.0),
     *(({key: no}, 0.0) for key in ("loss", "loss_mask", "trainable", "learnable") for no in (0, 0.0, "0", False)),
     ({"loss_mask": 1}, 1.0), ({"loss_mask": "1.0"}, 1.0)],
)  # fmt: skip
def test_the_weight_of_a_row(columns, weight):
    """A logged loss of 2.31 is no weight."""
    for row in ({"messages": [USER, REPLY]}, {"x": "2+2=", "y": "4"}, {"question": "2+2?", "answer": "4"}):
        assert normalise(row | columns).weight == weight


def test_axolotls_details_and_weights_of_parts_become_spans():
    detail = [
        {"begin_offset": 9, "end_offset": 18, "train": True},
        {"begin_offset": 0, "end_offset": 8, "train": False},
        {"begin_offset": 19, "end_offset": 31, "train": False},  # one past the content, taken for its end
    ]
    said = {"role": "assistant", "content": "I'm doing very well, thank you!"}
    spans = [
        {"start": 0, "stop": 9, "weight": 0.0}, {"start": 9, "stop": 19, "weight": 1.0},
        {"start": 19, "stop": 31, "weight": 0.0},
    ]  # fmt: skip
    for key in ("training_detail", "train_detail"):
        assert normalise({"messages": [USER, said | {key: detail}]}).messages[1] == said | {"spans": spans}
    parts = [
        {"type": "text", "text": "I'm doing", "loss_mask": 0},
        {"type": "text", "text": " very well", "weight": 1},
        {"type": "text", "text": ", thank you!", "loss": False},
    ]
    assert normalise({"messages": [USER, said | {"content": parts}]}).messages[1] == said | {"spans": spans}
    nothing = said | {"spans": [{"start": 0, "stop": 3, "weight": 0}]}
    assert normalise({"messages": [USER, nothing]}).messages[1]["weight"] == 0.0, "nor is its end"


@pytest.mark.parametrize(
    ("role", "known"),
    [("Assistant", "assistant"), ("gpt", "assistant"), ("human", "user"), ("model", "assistant"), ("USER", "user"),
     ("observation", "tool"), ("tool_response", "tool"), ("developer", "developer"), ("ipython", "ipython")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["role", "from"])
def test_roles_by_any_plain_name(key, role, known):
    message = normalise({"messages": [{key: role, "content": "a"}, REPLY]}).messages[0]
    assert message == {"role": known, "content": "a"}


def test_a_call_under_a_role_of_its_own():
    said = {"role": "tool_call", "content": json.dumps(CALL["function"]), "loss": False}
    message = normalise({"messages": [USER, said]}).messages[1]
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0.0}


def test_further_roles_by_name():
    row = {"messages": [{"role": "critic", "content": "a"}, REPLY]}
    assert normalise(row, roles=["critic"]).messages[0]["role"] == "critic"
    with pytest.raises(RowError, match="roles="):
        normalise(row)


@pytest.mark.parametrize("row", [
    {"messages": [USER, REPLY | {"prefix": True}]},
    {"messages": [USER, REPLY | {"partial": True}]},
    {"messages": [USER, REPLY], "continue_final_message": True},
])  # fmt: skip
def test_a_reply_that_is_left_open(row):
    noun = normalise(row)
    assert noun == Conversation((USER, REPLY), continue_final_message=True)


@pytest.mark.parametrize(
    ("message", "as_if"),
    [
        ({"reasoning_content": "T", "thinking": "T"}, {"reasoning_content": "T", "thinking": "T"}),
        ({"reasoning_content": "", "thinking": "T", "reasoning": None}, {"thinking": "T"}),
        ({"from": "gpt", "value": "4"}, {"from": "gpt", "value": "4"}),
        ({"from": "Ann", "value": ""}, {"from": "Ann", "value": ""}),
        ({"content": "", "value": "4"}, {}),
        ({"content": [{"type": "text", "text": "4", "value": ""}]}, {}),
        ({"prefix": False, "partial": False}, {}),
    ],
)  # fmt: skip
def test_two_names_of_one_field_may_agree_or_be_empty(message, as_if):
    assert normalise({"messages": [USER, REPLY | message]}).messages[1] == REPLY | as_if


def test_two_columns_of_one_meaning_may_agree():
    row = {"messages": [USER, REPLY], "rejected_response": "5"}
    assert normalise(row | {"rejected": "5", "rejected_messages": []}) == normalise(row)
    assert normalise({"messages": [USER, REPLY], "continue_final_message": False}) == PLAIN


def test_a_completion_continues_the_prompts_reply():
    begun, rest = REPLY | {"content": "It is "}, REPLY | {"content": "4."}
    whole = REPLY | {"content": "It is 4.", "spans": [{"start": 6, "stop": 8, "weight": 1.0}]}
    noun = normalise({"prompt": [USER, begun | {"prefix": True}], "completion": [rest]})
    assert noun == Conversation((USER, whole))
    with pytest.raises(RowError, match="doesn't continue it"):
        normalise({"prompt": [USER, begun | {"prefix": True}], "completion": [USER, rest]})


def test_columns_that_hold_nothing_or_a_class_change_nothing():
    assert (
        normalise({"messages": [USER, REPLY], "images": [], "rejected": None, "label": "arithmetic"}) == PLAIN
    )
    assert normalise({"text": "2+2=4", "label": 1}) == Pair("", "2+2=4")
    assert normalise({"image": "2+2=", "label": "4"}, columns=("image", "label"), as_text=True) == Pair(
        "2+2=", "4"
    )


def test_keys_that_nobody_reads():
    messages = [USER | {"mood": "glad", "id": 7, "name": "A"}, REPLY | {"weight": 1.0}]
    assert unread_keys(messages, "{{ m.content }}{{ m['mood'] }}") == ["id"]


# --- preferences -----------------------------------------------------------------------------------------

WORSE = {"role": "assistant", "content": "5"}
OPENAI = {"preferred_output": [REPLY], "non_preferred_output": [WORSE]}
TWO = Preference(PLAIN, Conversation((USER, WORSE)))


@pytest.mark.parametrize(
    ("row", "noun"),
    [
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [WORSE]}, TWO),
        ({"prompt": [USER], "chosen": REPLY, "rejected": WORSE}, TWO),
        ({"chosen": [USER, REPLY], "rejected": [USER, WORSE]}, TWO),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "5"}}, TWO),
        ({"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}, TWO),
        ({"messages": [USER, REPLY], "rejected_response": "5"}, TWO),
        ({"messages": [USER, REPLY], "rejected_messages": [WORSE]}, TWO),
        ({"input": {"messages": [USER], "tools": []}, **OPENAI}, TWO),
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, Preference(Pair("2+2=", "4"), Pair("2+2=", "5"))),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": 2}, Preference(Pair("a", "b"), Pair("a", "c"), 2.0)),
        (
            {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
            Preference(*(Pair("\n\nHuman: 2+2?\n\nAssistant:", y) for y in (" 4", " 5"))),
        ),
    ],
)  # fmt: skip
def test_preferences_in_every_form(row, noun):
    assert normalise(row) == noun


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ({"chosen": [REPLY], "rejected": [WORSE]}, "conflict", "rejected"),
        ({"chosen": [USER, REPLY], "rejected": [{"role": "user", "content": "3"}, WORSE]}, "conflict", "rejected"),
        ({"messages": [USER], "rejected_response": "5"}, "conflict", "messages"),
        ({"input": {}, **OPENAI}, "missing_field", "input.messages"),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": []}, "empty_messages", "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["a"]}, "not_text", "images"),
    ],
)  # fmt: skip
def test_preferences_that_are_none(row, reason, field):
    with pytest.raises(RowError) as caught:
        normalise(row)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def lines_of_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    return re.findall(r"^\| ([^|]+) \| `(\{.*\})` \| (\w+) \|$", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "line", "noun"), lines_of_the_documentation())
def test_the_documentations_lines_are_read_as_it_says(name, line, noun):
    row = json.loads(line)
    assert type(normalise(row)).__name__ == noun
    if name in FORMATS:
        assert recognise(row).name == name


def test_the_documentation_has_every_format():
    named = {name for name, _, _ in lines_of_the_documentation()}
    assert set(FORMATS) <= named
    assert len(lines_of_the_documentation()) == 30


def test_further_columns_reach_the_template():
    row = {
        "messages": [USER],
        "documents": [{"title": "t"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    noun = normalise(row)
    assert noun.documents == [{"title": "t"}]
    assert noun.template_kwargs == {"enable_thinking": False}


def message_fault(message, reason, field):
    return {"messages": [USER, message]}, reason, f"messages[1]{field}"


def call_fault(call, reason, field):
    return message_fault(REPLY | {"tool_calls": [call]}, reason, f".tool_calls[0].{field}")


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ([], "not_an_object", ""),
        ({}, "unknown_format", ""),
        ({"messages": [USER], "conversations": [HUMAN]}, "unknown_format", ""),
        ({"messages": []}, "empty_messages", "messages"),
        ({"messages": {"role": "user"}}, "wrong_type", "messages"),
        ({"messages": "[half"}, "broken_json", "messages"),
        ({"messages": "oops"}, "wrong_type", "messages"),
        message_fault("hi", "wrong_type", ""),
        message_fault({"content": "4"}, "missing_role", ".role"),
        message_fault({"role": 4, "content": "4"}, "wrong_type", ".role"),
        message_fault({"role": "assistant"}, "null_content", ".content"),
        message_fault({"role": "assistant", "content": None, "tool_calls": []}, "null_content", ".content"),
        message_fault({"role": "assistant", "content": 4}, "wrong_type", ".content"),
        message_fault({"role": "assistant", "content": "\ud800"}, "lone_surrogate", ".content"),
        message_fault({**REPLY, "mood": ["\ud800"]}, "lone_surrogate", ".mood[0]"),
        message_fault({**REPLY, "\ud800": "glad"}, "lone_surrogate", ""),
        message_fault({**REPLY, "mood": nested(64)}, "too_deep", ""),
        message_fault(calling({"a": nested(64)}), "too_deep", ""),
        message_fault(calling({"a": "\ud800"}), "lone_surrogate", ".tool_calls[0].arguments.a"),
        message_fault({**calling({}), "tool_calls": [CALL | {"id": "\ud800"}]}, "lone_surrogate", ".tool_calls[0].id"),
        ({"messages": [REPLY], "documents": [{"a": "\ud800"}]}, "lone_surrogate", "documents[0].a"),
        ({"messages": [REPLY], "documents": [{"a": nested(64)}]}, "too_deep", "documents[0]"),
        ({"messages": [REPLY], "chat_template_kwargs": {"a": "\ud800"}}, "lone_surrogate", "chat_template_kwargs.a"),
        ({"messages": [REPLY], "tools": [{"name": "f", "\ud800": 1}]}, "lone_surrogate", "tools[0].function"),
        message_fault({"role": "assistant", "content": ["4"]}, "wrong_type", ".content[0]"),
        message_fault({"role": "user", "content": [{"type": "image"}]}, "unknown_part", ".content[0]"),
        message_fault({"role": "user", "content": [{"type": ["text"]}]}, "unknown_part", ".content[0]"),
        message_fault({"role": "user", "content": [{"type": "text"}]}, "wrong_type", ".content[0]"),
        message_fault(
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "reasoning", "value": "b"}]},
            "part_order", ".content",
        ),
        message_fault(
            {"role": "user", "content": [{"type": "thinking", "thinking": "a"}], "reasoning_content": "b"},
            "conflict", ".reasoning_content",
        ),
        message_fault(REPLY | {"reasoning_content": 4}, "wrong_type", ".reasoning_content"),
        message_fault(REPLY | {"weight": "1"}, "bad_weight", ".weight"),
        message_fault(REPLY | {"weight": True}, "bad_weight", ".weight"),
        message_fault(REPLY | {"weight": -1}, "bad_weight", ".weight"),
        message_fault(REPLY | {"weight": float("nan")}, "bad_weight", ".weight"),
        message_fault(REPLY | {"weight": 10**400}, "bad_weight", ".weight"),
        message_fault(REPLY | {"train": 1}, "bad_weight", ".train"),
        message_fault(REPLY | {"loss": 0.5}, "bad_weight", ".loss"),
        message_fault(REPLY | {"loss_mask": [1]}, "bad_weight", ".loss_mask"),
        message_fault(REPLY | {"mask": 1}, "bad_weight", ".mask"),
        message_fault(REPLY | {"masked": "true"}, "bad_weight", ".masked"),
        message_fault(REPLY | {"masked": True, "loss": True}, "conflict", ".loss"),
        message_fault(REPLY | {"spans": [{"start": 0, "stop": 2}]}, "bad_span", ".spans[0].stop"),
        message_fault(REPLY | {"spans": [{"start": 0, "end": 1}]}, "bad_span", ".spans[0]"),
        message_fault(REPLY | {"spans": [{"start": -1, "stop": 1}]}, "bad_span", ".spans[0].start"),
        message_fault(REPLY | {"spans": [{"start": 0, "stop": 1}] * 2}, "bad_span", ".spans"),
        message_fault(REPLY | {"spans": [], "train_detail": []}, "conflict", ".spans"),
        message_fault(REPLY | {"train_detail": [DETAIL]}, "bad_weight", ".train_detail[0].train"),
        message_fault({"role": "assistant", "tool_calls": [CALL], "spans": []}, "bad_span", ".spans"),
        message_fault(REPLY | {"content": [{"type": "reasoning", "value": "a", "loss": 0}]}, "bad_weight", ".content"),
        message_fault(REPLY | {"reasoning_content": "T1", "thinking": "T2"}, "conflict", ".thinking"),
        message_fault(REPLY | {"reasoning_content": "T1", "reasoning": "T2"}, "conflict", ".reasoning"),
        message_fault(
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}], "reasoning": "b"},
            "conflict", ".reasoning",
        ),
        message_fault(REPLY | {"value": "5"}, "conflict", ".value"),
        message_fault(REPLY | {"from": "human"}, "conflict", ".from"),
        message_fault(
            {**REPLY, "content": [{"type": "text", "text": "4", "value": "5"}]}, "conflict", ".content[0].text"
        ),
        message_fault(REPLY | {"prefix": True, "partial": False}, "conflict", ".prefix"),
        ({"messages": [USER, REPLY | {"prefix": True}], "continue_final_message": False}, "conflict",
         "continue_final_message"),
        ({"prompt": "x", "chosen": "4", "rejected": "5", "rejected_response": "6"}, "conflict", "rejected_response"),
        ({"messages": [USER, REPLY], "rejected_response": "5", "rejected": "6"}, "conflict", "rejected_response"),
        ({"prompt": "x", "completions": ["y"], "rewards": [1], "scores": [2]}, "conflict", "scores"),
        message_fault(REPLY | {"prefix": "yes"}, "wrong_type", ".prefix"),
        message_fault(USER | {"prefix": True}, "conflict", ".prefix"),
        ({"messages": [REPLY | {"prefix": True}, USER, REPLY]}, "conflict", "messages[0].prefix"),
        ({"messages": [USER], "continue_final_message": True}, "conflict", "continue_final_message"),
        ({"messages": [USER, REPLY], "weight": -1}, "bad_weight", "weight"),
        ({"messages": [USER, REPLY], "weight": "heavy"}, "bad_weight", "weight"),
        ({"messages": [USER, REPLY], "weight": 1, "sample_weight": 2}, "conflict", "weight"),
        ({"messages": [USER, REPLY], "loss_mask": [0, 1]}, "bad_weight", "loss_mask"),
        ({"messages": [USER, REPLY], "loss_mask": 0.5}, "bad_weight", "loss_mask"),
        ({"messages": [USER, REPLY], "loss": "no"}, "bad_weight", "loss"),
        ({"messages": [USER, REPLY], "mask": 1}, "bad_weight", "mask"),
        ({"messages": [USER, REPLY], "masked": "1"}, "bad_weight", "masked"),
        ({"messages": [USER, REPLY], "loss_mask": 0, "weight": 1}, "conflict", "weight"),
        ({"messages": [USER, REPLY], "label": True, "kto_tag": False}, "conflict", "label"),
        ({"prompt": "x", "chosen": "y", "rejected": "z", "label": True}, "judged_row", "label"),
        ({"prompt": "x", "completions": ["y"], "rewards": [1, 2]}, "wrong_length", "rewards"),
        ({"prompt": "x", "completions": ["y"], "rewards": ["1"]}, "wrong_type", "rewards[0]"),
        ({"prompt": "x", "completions": ["y"], "rewards": [float("nan")]}, "not_a_number", "rewards[0]"),
        ({"prompt": "x", "completions": ["y", 4], "rewards": [1, 2]}, "wrong_type", "completions[1]"),
        ({"messages": [USER, REPLY], "rejected": "5"}, "preference_row", "rejected"),
        ({"prompt": "x", "completion": "y", "rejected_response": "5"}, "preference_row", "rejected_response"),
        ({"messages": [USER, REPLY], "images": ["a.png"]}, "not_text", "images"),
        ({"question": "x", "answer": "y", "image": "a.png"}, "not_text", "image"),
        message_fault({"role": "assitant", "content": "4"}, "unknown_role", ".role"),
        message_fault({"role": "robot", "content": "4"}, "unknown_role", ".role"),
        message_fault(USER | {"images": ["a.png"]}, "not_text", ".images"),
        ({"prompt": "x", "completion": "y", "documents": [{"a": "b"}]}, "conflict", "documents"),
        ({"prompt": "x", "completion": "y", "continue_final_message": True}, "conflict", "continue_final_message"),
        message_fault(REPLY | {"train": True, "loss_weight": 0}, "conflict", ".loss_weight"),
        message_fault(REPLY | {"tool_calls": CALL}, "wrong_type", ".tool_calls"),
        message_fault(REPLY | {"tool_calls": [CALL], "function_call": CALL}, "conflict", ".function_call"),
        call_fault({"arguments": {}}, "wrong_type", "name"),
        call_fault({"name": "f"}, "missing_field", "arguments"),
        call_fault({"name": "f", "arguments": "{"}, "broken_json", "arguments"),
        call_fault({"name": "f", "arguments": "4"}, "wrong_type", "arguments"),
        ({"messages": [USER], "tools": "[{]"}, "broken_json", "tools"),
        ({"messages": [USER], "tools": '[{"a": 1, "a": 2}]'}, "duplicate_key", "tools"),
        ({"messages": [USER], "tools": [{"a": "no name"}]}, "missing_field", "tools[0].name"),
        ({"messages": [USER], "tools": {"name": "f"}}, "wrong_type", "tools"),
        ({"messages": [USER], "functions": {"name": "f"}}, "wrong_type", "functions"),
        ({"messages": [USER], "functions": [{"name": "f"}], "tools": [{"name": "f"}]}, "conflict", "functions"),
        call_fault({"name": "f", "arguments": '{"a": 1e400}'}, "not_a_number", "arguments"),
        call_fault({"name": "f", "arguments": {"a": float("nan")}}, "wrong_type", "arguments"),
        ({"messages": [{"role": "system", "content": "s"}], "system": "t"}, "conflict", "system"),
        ({"conversations": [{"from": "humn", "value": "?"}]}, "unknown_role", "conversations[0].from"),
        ({"conversations": [{"from": "human", "value": None}]}, "null_content", "conversations[0].value"),
        ({"conversations": [{"from": "tool_call", "value": "add"}]}, "broken_json", "conversations[0].value"),
        ({"prompt": "x", "completion": None}, "wrong_type", "completion"),
        ({"prompt": [USER], "completion": "4"}, "wrong_type", "prompt"),
        ({"prompt": "x", "completion": "y", "tools": [{"name": "f"}]}, "conflict", "tools"),
        ({"question": "x", "answer": 4}, "wrong_type", "answer"),
        ({"instruction": "x", "output": "y", "input": 0}, "wrong_type", "input"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "wrong_type", "history[0]"),
        ({"text": None}, "wrong_type", "text"),
    ],
)  # fmt: skip
def test_every_fault_names_its_field(row, reason, field):
    with pytest.raises(RowError) as caught:
        normalise(row)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_an_unknown_role_gets_the_nearest():
    with pytest.raises(RowError, match="did you mean 'human'"):
        normalise({"conversations": [{"from": "humn", "value": "?"}]})


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        (["messages", "conversations"], "fit 2 formats: messages, sharegpt"),
        (["prompt", "completion", "messages"], "fit 2 formats: messages, prompt_completion"),
        (["mesages", "id"], "did you mean 'messages' by 'mesages'"),
        (["prompt", "canonical_solution"], "prompt_completion lacks 'completion'"),
        (["foo"], "fit no known format"),
        (["segments"], "input_output: give token ids"),
        (["prompt", "completions", "labels"], "rewards of single steps"),
        ([], "fit no known format"),
    ],
)
def test_unknown_and_ambiguous_columns_say_what_to_do(columns, what):
    with pytest.raises(DataError, match=what) as caught:
        recognise(columns)
    assert all(repr(c) in caught.value.why for c in columns)
    assert "fmt=" in caught.value.fix
    assert "x= and y=" in caught.value.fix


def test_a_name_decides_where_columns_are_ambiguous():
    assert recognise(["messages", "conversations"], fmt="sharegpt").name == "sharegpt"


@pytest.mark.parametrize(
    ("named", "error", "what"),
    [
        ({"fmt": "sharegtp"}, ConfigError, "did you mean 'sharegpt'"),
        ({"x": "question"}, ConfigError, "go together"),
        ({"x": "question", "y": "answer", "fmt": "alpaca"}, ConfigError, "beside"),
        ({"as_text": True}, ConfigError, "two columns"),
        ({"x": "questions", "y": "answer"}, DataError, "did you mean 'question'"),
        ({"fmt": "alpaca"}, DataError, "'instruction'"),
    ],
)
def test_wrong_names(named, error, what):
    with pytest.raises(error, match=what):
        recognise(["question", "answer"], **named)


def test_a_column_that_is_nearly_known_gets_a_hint():
    columns = ["messages", "tols", "id"]
    assert recognise(columns).sentence(columns).endswith("ignored: tols (did you mean tools?), id)")
    with pytest.raises(DataError, match="did you mean 'prompt' by 'promt'"):
        recognise(["promt", "completion"])
