"""Faults that users met, each with its right value: templates of today on a real vocabulary.

The vocabulary is SmolLM2's, split as Qwen's tokenizer splits: in every real BPE `\\n\\n` is one token, so that what
fits by text may not fit by ids.
"""

from __future__ import annotations

import copy

import pytest
from templates.conversations import call, calls, reply, result, system, tool, user
from templates.stock import stock_templates
from tokenizers import Regex, pre_tokenizers

from ygivenx import Encoder, Example, RowError

SHELF = stock_templates()
THINKERS = [n for n in ("qwen3_5_think", "qwen3_6", "qwen3_8") if n in SHELF]
needs_templates = pytest.mark.skipif(not THINKERS, reason="TRL is not installed")

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def tokenizer(smol_tokenizer):
    made = copy.deepcopy(smol_tokenizer)
    words = pre_tokenizers.Split(Regex(QWEN), "isolated")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return made


def made(tokenizer, template: str, **options) -> Encoder:
    tokenizer.chat_template = SHELF.get(template, template)
    return Encoder(tokenizer, **options)


def trained(example: Example) -> str:
    return "".join(example.trained)


def refusal(encoder: Encoder, *messages: dict, **more) -> RowError:
    with pytest.raises(RowError) as e:
        encoder({"messages": list(messages), **more})
    return e.value


SWITCHED_OFF = "rendered with enable_thinking=False: use the same at inference"
WITHOUT_THOUGHTS = {
    "plain": [user(), reply("yo")],
    "turns": [user(), reply("yo"), user("And?"), reply("no")],
    "system": [system(), user(), reply("yo")],
    "calls": [user(), calls(call()), result("clear"), reply("yo")],
}


@needs_templates
@pytest.mark.parametrize("name", THINKERS)
@pytest.mark.parametrize("rows", WITHOUT_THOUGHTS)
def test_a_reply_without_a_thought_where_the_prompt_opens_one(tokenizer, name, rows):
    """Y1: P ends in `<think>\\n` and F goes on `\\n</think>`, so that `\\n\\n` would be one token across the border."""
    row = {"messages": WITHOUT_THOUGHTS[rows], "tools": [tool()] if rows == "calls" else None}
    example = made(tokenizer, name)(row)
    assert trained(example).endswith("yo<|im_end|>" if rows != "turns" else "no<|im_end|>")
    assert "think>" not in trained(example)
    for sequence in example.sequences:
        assert SWITCHED_OFF in sequence.notes
        first = int(sequence.output.argmax())
        before = row["messages"][: next(s.message for s in sequence.segments if s.output)]
        shown = tokenizer.apply_chat_template(
            before, tools=row["tools"], add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        assert sequence.ids[:first].tolist() == shown


@needs_templates
@pytest.mark.parametrize("name", THINKERS)
def test_a_reply_with_a_thought_stays_as_it_is(tokenizer, name):
    example = made(tokenizer, name)({"messages": [user(), reply("yo", reasoning_content="hm")]})
    assert (trained(example), example.only.notes) == ("hm\n</think>\n\nyo<|im_end|>", ())
