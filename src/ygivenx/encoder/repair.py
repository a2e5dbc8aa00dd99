"""Repairs of rows that a template doesn't write as inference would show them, each by name.

| name             | mends                                                                        | by default |
|------------------|------------------------------------------------------------------------------|-----|
| template_kwargs  | a switch of the template's, such as enable_thinking=False, makes both agree  | yes |
| arguments_as_text| tool calls' arguments as JSON text, where the template needs them so         | yes |
| content_as_parts | contents as lists of one text part, where the template needs them so         | yes |
| whitespace       | the prompt and the rendered row differ in white space alone                  | yes |
| history          | the template writes what is further back differently once the reply is there | yes |
| open_think       | the prompt opens <think>, and the reply brings its own reasoning             | yes |
| closed_think     | the prompt has an empty, closed thought, which the rendered row lacks        | yes |
| opening          | no reply can be asked for before the first question: it is context           | yes |
| only_end         | nothing ends the turn: the one token that is known to stop is appended       | yes |
| append_end       | the same where several tokens are known to stop: the tokenizer's eos         | no  |
| empty_think      | the prompt opens <think>, and the reply has none: it is closed at once       | no  |

By default come those that leave no choice: they lose nothing that the model could be asked for, and what they add is
what it would have to write. Each leaves a note.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, nearest
from .inputs import REASONING_FIELDS, Inputs
from .template import Template

IN_ROWS = ("template_kwargs", "arguments_as_text", "content_as_parts")  # other inputs that say the same
DEFAULT = (*IN_ROWS, "whitespace", "history", "open_think", "closed_think", "opening", "only_end")
REPAIRS = (*DEFAULT, "append_end", "empty_think")
IN_TURNS = frozenset(REPAIRS) - frozenset(IN_ROWS)  # done while a turn is proven

OPENED = re.compile(r"<think>\s*\Z")
CLOSED = re.compile(r"<think>\s*</think>\s*\Z")
_SWITCH = re.compile("think|reason")


def chosen(repair: str | Iterable[str]) -> frozenset[str]:
    """The repairs of a choice: "default", "none", "all" or names; raises ConfigError for an unknown one."""
    named = {"default": DEFAULT, "none": (), "all": REPAIRS}
    if isinstance(repair, str):
        repair = named.get(repair) or [n for n in repair.split(",") if n and n != "none"]
    names: set[str] = set()
    for name in repair:
        if name != "default" and name not in REPAIRS:
            raise ConfigError(f"repair={name!r}{nearest(name, REPAIRS)}", fix=f"known: {', '.join(REPAIRS)}")
        names |= set(DEFAULT) if name == "default" else {name}
    return frozenset(names)


def alternatives(
    template: Template, inputs: Inputs, repairs: frozenset[str]
) -> Iterator[tuple[Inputs, tuple[str, ...]]]:
    """Other inputs that say the same, with a note: worth a trial where the row as it is can't be proven."""
    bases: list[tuple[Inputs, tuple[str, ...]]] = [(inputs, ())]
    if "arguments_as_text" in repairs and any(map(_has_arguments, inputs.messages)):
        text = replace(inputs, messages=tuple(map(_with_text, inputs.messages)))
        bases.append((text, ("the template takes tool calls' arguments as text: given as JSON",)))
    if "content_as_parts" in repairs and _reads_parts(template.source):
        parts = replace(inputs, messages=tuple(map(_with_parts, inputs.messages)))
        bases.append((parts, ("the template takes contents as lists of parts: given as one text part each",)))
    yield from bases[1:]
    if "template_kwargs" in repairs:
        for base, notes in bases:
            for name in sorted(
                n for n in template.undeclared if _SWITCH.search(n) and n not in inputs.kwargs
            ):
                for value in _values(name, inputs):
                    note = f"rendered with {name}={value}: use the same at inference"
                    yield replace(base, kwargs={**base.kwargs, name: value}), (*notes, note)


_LENGTH = re.compile(
    "clear|truncate|preserve|keep|history|previous"
)  # of how much history shows, not whether to think


def _values(name: str, inputs: Inputs) -> tuple[bool, ...]:
    """What a switch may be set to: thinking is switched off for replies without a thought alone, on for others."""
    replies = [m for m in inputs.messages if m.get("role") == "assistant"]
    if _LENGTH.search(name) or not replies:
        return False, True
    thoughts = {thinks(m) for m in replies}
    return (thoughts.pop(),) if len(thoughts) == 1 else ()


def thinks(message: Mapping[str, Any]) -> bool:
    """Whether a reply has a thought, in a field of its own or in its content."""
    content = message.get("content")
    written = isinstance(content, str) and "</think>" in content
    return written or any(str(message.get(name) or "").strip() for name in REASONING_FIELDS)


def _has_arguments(message: Mapping[str, Any]) -> bool:
    return any(isinstance(_arguments(c), Mapping) for c in message.get("tool_calls") or [])


def _reads_parts(template: str) -> bool:
    return "'type'" in template or '"type"' in template or ".type" in template


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
    )


def _arguments(call: Any) -> Any:
    return call.get("function", call).get("arguments")


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = _arguments(call)
        if isinstance(arguments, Mapping):
            text = {"arguments": json.dumps(arguments, ensure_ascii=False)}
            call = call | ({"function": call["function"] | text} if "function" in call else text)
        calls.append(call)
    return {**message, "tool_calls": calls}


def own_reasoning(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reasoning, answer) of a reply that brings its own, as the text after an open `<think>`; else None."""
    content, reasoning = message.get("content") or "", message.get("reasoning_content")
    if not isinstance(content, str):
        return None
    if isinstance(reasoning, str) and reasoning.strip():
        return reasoning.strip(), content
    before, found, answer = content.partition("</think>")
    if not found or before.lstrip()[:7] != "<think>":
        return None
    return before.lstrip()[7:].strip(), answer.lstrip()
