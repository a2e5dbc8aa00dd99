"""`ygx show --explain`: what inference shows (P), what the conversation renders to (F), and where they part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError
from ..rows.nouns import Conversation
from ..show import visible

SHOWN = 160  # characters around the place where two texts part


def explained(tokenizer: Any, row: Any) -> Iterator[str]:
    """Lines for each message of the assistant, made with the tokenizer's own template alone.

    The reply is what F has behind P. Where F doesn't begin with P, a model that is trained on F never sees what
    inference shows it, and the lines show both texts from the place where they part.
    """
    if tokenizer.chat_template is None or not isinstance(row, Conversation):
        raise ConfigError(
            "this row isn't rendered by a chat template", fix="--explain is for rows of messages"
        )
    messages: list[Any] = list(row.messages)
    template = {**row.template_kwargs, "tools": row.tools, "documents": row.documents}
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            prompt = _rendered(tokenizer, messages[:i], True, template)
            whole = _rendered(tokenizer, messages[: i + 1], False, template)
            yield from _compared(i, prompt, whole)


def _compared(i: int, prompt: str, whole: str) -> Iterator[str]:
    shared = len(os.path.commonprefix([prompt, whole]))  # noqa: RUF071  # of characters
    yield f"messages[{i}]: P has {len(prompt):,} characters, F {len(whole):,}; they agree for {shared:,}"
    yield f"  both, up to there: …{_quoted(whole[max(0, shared - SHOWN) : shared])}"
    if shared < len(prompt):
        yield f"  P goes on:         {_quoted(prompt[shared : shared + SHOWN])}"
        yield f"  F goes on:         {_quoted(whole[shared : shared + SHOWN])}"
        yield "  F doesn't begin with P: the reply would follow what inference never shows"
    else:
        yield f"  the reply:         {_quoted(whole[shared : shared + SHOWN])}"


def _rendered(tokenizer: Any, messages: list[Any], generation: bool, template: dict[str, Any]) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation, **template
    )
    return str(text)


def _quoted(text: str) -> str:
    return repr(visible(text))
