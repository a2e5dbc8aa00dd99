"""A row's text is not control: special tokens that it writes are refused, or cut so that they are encoded as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from re import Match
from typing import Any

from ..errors import RowError
from ..templating.inputs import ROLES, Inputs
from ..templating.origins import Source, within
from ..templating.template import Template
from .candidates import Rendering
from .refusals import control_text
from .tokens import Encoded, Tokens

# A reply may bring its thought in its text, marks and all.
_THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)


def headers_of(tokenizer: Any) -> list[str]:
    """The ordinary added tokens that the chat template writes around what messages and tools say.

    DeepSeek's <｜User｜> and <｜tool▁outputs▁begin｜> aren't special to their tokenizer, but whoever writes one begins
    a turn or forges a result. What it writes around calls may be in a text: replies are made of it.
    """
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if not t.special}
    marks = [t for t in added if not t.isspace() and not t.isalnum() and not _THOUGHT.search(t)]
    if not marks or not tokenizer.chat_template:
        return []
    pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))

    def written(*conversations: list[dict[str, Any]], tools: Any = None) -> set[str]:
        return set(pattern.findall(_first_rendering(tokenizer, conversations, tools)))

    say = [{"role": role, "content": "word"} for role in ("system", "user", "assistant", "user")]
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **_FUNCTION}]}
    result = {"role": "tool", "content": "word", "name": "word", "tool_call_id": "abcdefghi"}
    results = written([say[1], call, result], tools=[_FUNCTION]) - written([say[1], call], tools=[_FUNCTION])
    return sorted(written(say, say[1:], say[1:2]) | results)


_FUNCTION = {"type": "function", "function": {"name": "word", "arguments": {}}}


def _first_rendering(tokenizer: Any, conversations: Iterable[list[dict[str, Any]]], tools: Any) -> str:
    """The first of the conversations that the template takes, rendered; "" if it takes none."""
    try:  # what is wrong with it, chats will say; pairs don't need it
        template = Template(tokenizer.get_chat_template(tools=tools), tokenizer.special_tokens_map)
    except (RowError, ValueError):
        return ""
    for messages in conversations:
        try:
            return template.render(Inputs(tuple(messages), tools), add_generation_prompt=True)
        except RowError:
            continue
    return ""


def refuse_control(tokens: Tokens, inputs: Inputs) -> None:
    """Raise RowError if a text of the row, or the name of a field, holds a special token."""
    given = {
        "messages": inputs.messages,
        "tools": inputs.tools,
        "documents": inputs.documents,
        **inputs.kwargs,
    }
    if not tokens.has_control(json.dumps(given, ensure_ascii=False, default=str)):
        return
    for path, text in _leaves(given):
        if found := tokens.has_control(text):
            raise control_text(found[0], path)


def refuse_alike(tokens: Tokens, encoded: Encoded, given: Mapping[str, Any]) -> None:
    """Raise RowError if the tokenizer made a special token of what is written otherwise; `given`: the row's texts."""
    for token, written in tokens.alike(encoded):
        path = next((path for path, text in _leaves(given) if written.strip() in text), "")
        raise control_text(
            token, path, f"it is written {written!r}, and the tokenizer normalises before it looks"
        )


def control_cuts(tokens: Tokens, rendering: Rendering, control: str) -> tuple[int, ...]:
    """Where the text is cut so that no control token is made of a row's characters.

    Raises RowError where control="refuse" and the template and the row write such a token together, and where the
    origin of characters isn't known.
    """
    if control == "parse":
        return ()
    traced = next((t.traced for t in rendering.turns if t.traced), rendering.traced)
    if traced is None:
        what = "the origin of this text's characters can't be followed through the template"
        why = "so control tokens of the row's can't be told from the template's"
        raise RowError(what, reason="no_origins", why=why, fix="control='parse' trusts the row")
    runs, sources = traced.text.runs, traced.sources

    def foreign(found: Match[str]) -> Source | None:
        inside = (sources[s] for s in within(runs, *found.span()) if s)
        return next((s for s in inside if s.field != "role" or s.text not in ROLES), None)

    cuts = tokens.cuts(rendering.text, lambda found: foreign(found) is not None)
    if cuts and control == "refuse":
        found = tokens.control(rendering.text, cuts[0] - 1)[0]
        source = foreign(found)
        raise control_text(
            found[0], source.path if source else "", "the template and the row write it together"
        )
    return cuts


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Each string of a row with its path; the names of its fields, which are text too, among them."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, str(key)
            yield from _leaves(item, here)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
