"""`ygx show --explain`: the texts of inference and of the row, where they agree and where they part."""

from __future__ import annotations

import pytest
from templates.stock import tokenizer_for
from test_chats import CHATML

from ygivenx.commands.explain import explained
from ygivenx.errors import ConfigError
from ygivenx.rows.formats import normalise

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def lines(template):
    tokenizer = tokenizer_for("x", template)
    tokenizer.chat_template = template
    return "\n".join(explained(tokenizer, normalise(ROW)))


def test_a_reply_follows_what_inference_shows():
    assert "the reply:" in lines(CHATML)
    assert "'Hello<|im_end|>" in lines(CHATML)


def test_where_the_texts_part_both_are_shown():
    template = CHATML + "{% if add_generation_prompt %}<think>{% endif %}"
    said = lines(template)
    assert "P goes on:         '<think>'" in said
    assert "F goes on:         'Hello<|im_end|>" in said
    assert "what inference never shows" in said


def test_plain_text_has_no_template():
    with pytest.raises(ConfigError, match="isn't rendered by a chat template"):
        list(
            explained(
                tokenizer_for("x", CHATML), normalise({"x": "a", "y": "b"}, columns=("x", "y"), as_text=True)
            )
        )
