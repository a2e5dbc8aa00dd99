"""Strategies: other ways to write a row that the template doesn't write as inference would show it, each by name.

| name              | what it does                                                                  | by default |
|-------------------|-------------------------------------------------------------------------------|-----|
| template_kwargs   | sets a switch of the template's, such as enable_thinking=False                | yes |
| arguments_as_text | gives tool calls' arguments as JSON text                                      | yes |
| content_as_parts  | gives contents as lists of typed parts, reasoning among them                  | yes |
| empty_content     | gives a missing content as "", or an empty one beside calls as none           | yes |
| thought_in_field  | gives a thought between <think> tags in a content as reasoning_content         | yes |
| thought_by_name   | gives a thought as `reasoning`, too, for a template that reads it so           | yes |
| whitespace        | keeps the prompt where it and the row differ in white space alone             | yes |
| history           | keeps the prompt where what is further back is written otherwise              | yes |
| open_think        | puts a reply's own reasoning after a prompt that opens a thought              | yes |
| closed_think      | keeps an empty, closed thought of the prompt's, which the row lacks           | yes |
| opening           | doesn't train what nothing asks for: a greeting, or a reply after a reply      | yes |
| only_end          | appends the one token that is known to stop, where nothing ends the turn      | yes |
| empty_think       | closes a thought that the prompt opens, where the reply has none, as context  | yes |
| append_end        | the same where several tokens are known to stop: the tokenizer's eos          | no  |
| developer_as_system | gives developer messages as system messages                                 | no  |
| system_as_user    | gives later system messages as the user's                                     | no  |

By default come those that leave no choice: they lose nothing that the model could be asked for, and what they add is
what it would have to write. Each leaves a note. A strategy gives inputs that say the same, or puts a turn together by
hand; whatever it gives has to be proven as any other candidate, and to say what the row says (content.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import refuse_unknown
from ..templating.inputs import REASONING_FIELDS, Inputs
from ..templating.template import Renderer
from .render import Chat

IN_ROWS = (
    "template_kwargs", "arguments_as_text", "content_as_parts", "empty_content", "thought_in_field", "thought_by_name",
)  # fmt: skip
DEFAULT = (
    *IN_ROWS, "whitespace", "history", "open_think", "closed_think", "opening", "only_end", "empty_think",
)  # fmt: skip
FOLDS = ("developer_as_system", "system_as_user")
REPAIRS = (*DEFAULT, "append_end", *FOLDS)
IN_TURNS = frozenset(REPAIRS) - {*IN_ROWS, *FOLDS}  # done while a turn is proven
CERTAIN = frozenset({"opening", "only_end"})  # of these: no text of the row has a part in them

SWITCH = re.compile("think|reason")
_NEGATED = re.compile("skip|disable|hide|without|(?:^|_)no_")  # what such a switch turns off is the thought
# Switches of how much history shows, not of whether to think.
_LENGTH = re.compile("clear|truncate|preserve|keep|history|previous")


def chosen(repair: str | Iterable[str]) -> frozenset[str]:
    """The repairs of a choice: "default", "none", "all" or names; raises ConfigError for an unknown one."""
    named = {"default": DEFAULT, "none": (), "all": REPAIRS}
    if isinstance(repair, str):
        repair = named.get(repair) or [n for n in repair.split(",") if n and n != "none"]
    names = frozenset(repair)
    refuse_unknown("repair", names - {"default"}, REPAIRS)
    return names - {"default"} | frozenset(DEFAULT if "default" in names else ())


@dataclass(frozen=True)
class Strategy:
    """One way to write a row: its inputs, what was changed in them, and what may be mended while turns are proven.

    forced: a thought that the prompt opens is continued by hand even where the template seems to continue it.
    is_symbolic: no text of the row has a part in it, so that it can be tried over placeholders.
    """

    inputs: Inputs
    notes: tuple[str, ...] = ()
    in_turns: frozenset[str] = frozenset()
    forced: bool = False
    is_symbolic: bool = False


def strategies(chat: Chat) -> Iterator[Strategy]:
    """Every strategy for a row but the last resorts, the least change first."""
    inputs, thoughts, repairs = chat.inputs, chat.options.thoughts, allowed(chat)
    in_turns = repairs & IN_TURNS - {"empty_think"}
    if thoughts == "off":
        for off, notes in _switched_off(chat):
            yield Strategy(off, notes, is_symbolic=True)
            if in_turns:
                yield Strategy(off, notes, in_turns)
    yield Strategy(inputs, is_symbolic=True)
    if thoughts.startswith("empty"):
        closed = "empty_think" if thoughts == "empty_masked" else "trained_empty_think"
        yield Strategy(inputs, (), in_turns | {closed}, forced=True)
    others = list(_said_otherwise(chat.template, inputs, repairs))
    settings = _settings(chat) if "template_kwargs" in repairs else []
    switched = [
        Strategy(*_with_switches(base, setting, notes), is_symbolic=base is inputs and not others)
        for base, notes in [(inputs, ()), *others]
        for setting in settings
    ]
    yield from (Strategy(other, notes) for other, notes in others)
    yield from switched
    if not in_turns:
        return
    alone = not others and not settings
    yield Strategy(inputs, (), in_turns, is_symbolic=alone)
    yield from (Strategy(other, notes, in_turns) for other, notes in others)
    yield from (replace(s, in_turns=in_turns, is_symbolic=False) for s in switched)
    yield Strategy(inputs, (), in_turns, forced=True, is_symbolic=alone)


def last_resorts(chat: Chat) -> Iterator[Strategy]:
    """What is tried when no other strategy is proven: replies without a thought where no switch turns thinking off, and
    thoughts in their field where the template knows the tags of a content, but not in this place."""
    repairs = allowed(chat)
    if "empty_think" in repairs and not all(chat.as_given.thinks[i] for i in chat.to_train):
        others = list(_said_otherwise(chat.template, chat.inputs, repairs))
        for base, notes in [(chat.inputs, ()), *others]:
            yield Strategy(base, notes, repairs & IN_TURNS, forced=True, is_symbolic=not others)
    messages = _thought_in_field(chat.inputs.messages)
    if "thought_in_field" in repairs and messages != chat.inputs.messages:
        moved = replace(chat, inputs=replace(chat.inputs, messages=messages))
        note = next(note for name, _, note in _CHANGES if name == "thought_in_field")
        yield from (replace(s, notes=(note, *s.notes), is_symbolic=False) for s in strategies(moved))


def allowed(chat: Chat) -> frozenset[str]:
    """The repairs that the options allow: as rendered, none of a turn."""
    o = chat.options
    return o.repairs if o.context == "inference" else o.repairs - IN_TURNS


def _said_otherwise(
    template: Renderer, inputs: Inputs, repairs: frozenset[str]
) -> Iterator[tuple[Inputs, tuple[str, ...]]]:
    """Other messages that say the same, each change alone and then all that apply together."""
    changes = [
        (change, note)
        for name, change, note in _CHANGES
        if name in repairs and (name not in _NEEDS or _NEEDS[name](template.source))
    ]
    for change, note in changes:
        messages = change(inputs.messages)
        if messages != inputs.messages:
            yield replace(inputs, messages=messages), (note,)
    # Together all of them, and all that leave contents texts: most templates that take parts take these alone, too.
    for left_out in ((), (_content_as_parts,)):
        messages, notes = inputs.messages, []
        for change, note in (c for c in changes if c[0] not in left_out):
            changed = change(messages)
            notes += [note] if changed != messages else []
            messages = changed
        if len(notes) > 1:
            yield replace(inputs, messages=messages), tuple(notes)


def _open_switches(chat: Chat) -> list[str]:
    """The template's switches of thinking, and of how much of it history shows, that the row leaves open."""
    names = chat.template.undeclared - chat.inputs.kwargs.keys() - set(REASONING_FIELDS)
    return sorted(n for n in names if SWITCH.search(n))


def _settings(chat: Chat) -> list[dict[str, bool]]:
    """What sets each of these switches, and all that turn thinking on or off."""
    values = {n: _values(chat, n) for n in _open_switches(chat)}
    together = {n: some[0] for n, some in values.items() if len(some) == 1}
    alone = [{n: v} for n, some in values.items() for v in some]
    return [*alone, *([together] if len(together) > 1 else [])]


def _with_switches(
    inputs: Inputs, values: Mapping[str, bool], notes: tuple[str, ...] = ()
) -> tuple[Inputs, tuple[str, ...]]:
    named = ", ".join(f"{name}={value}" for name, value in values.items())
    note = f"rendered with {named}: use the same at inference"
    return replace(inputs, kwargs={**inputs.kwargs, **values}), (*notes, note)


def _values(chat: Chat, name: str) -> tuple[bool, ...]:
    """What a switch may be set to: thinking is switched off for replies without a thought alone, on for others."""
    if _LENGTH.search(name) or not chat.to_train:
        return False, True
    thoughts = {chat.as_given.thinks[i] for i in chat.to_train}
    return (thoughts.pop() != bool(_NEGATED.search(name)),) if len(thoughts) == 1 else ()


def _switched_off(chat: Chat) -> Iterator[tuple[Inputs, tuple[str, ...]]]:
    """The inputs with thinking switched off, if no trained reply has a thought."""
    if any(chat.as_given.thinks[i] for i in chat.to_train):
        return
    for name in (n for n in _open_switches(chat) if not _LENGTH.search(n)):
        yield from (_with_switches(chat.inputs, {name: value}) for value in _values(chat, name))


# --- other messages --------------------------------------------------------------------------------------

Messages = tuple[dict[str, Any], ...]


def _arguments_as_text(messages: Messages) -> Messages:
    return tuple(map(_with_text, messages))


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, Mapping):
            text = {"arguments": json.dumps(arguments, ensure_ascii=False)}
            call = call | ({"function": call["function"] | text} if "function" in call else text)
        calls.append(call)
    return {**message, "tool_calls": calls}


def _content_as_parts(messages: Messages) -> Messages:
    return tuple(map(_with_parts, messages))


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content, thought = message.get("content"), message.get("reasoning_content")
    if not isinstance(content, str):
        return message
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}]
    if isinstance(thought, str) and thought:
        parts.insert(0, {"type": "thinking", "thinking": thought, "text": thought})
    return {**message, "content": parts}


_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)


def _thought_in_field(messages: Messages) -> Messages:
    return tuple(map(_with_reasoning, messages))


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str):
        return message
    found = _THOUGHT.fullmatch(content) if message.keys().isdisjoint(REASONING_FIELDS) else None
    return message | ({"reasoning_content": found[1].strip(), "content": found[2]} if found else {})


def _thought_by_name(messages: Messages) -> Messages:
    """The thought under the one of its names that transformers doesn't fill in."""
    thoughts = ((m, m.get("reasoning_content")) for m in messages)
    return tuple({**m, "reasoning": thought} if thought else m for m, thought in thoughts)


def _empty_content(messages: Messages) -> Messages:
    return tuple(map(_with_content, messages))


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    if "content" not in message:
        return {**message, "content": ""}
    if message["content"] == "" and message.get("tool_calls"):
        return {k: v for k, v in message.items() if k != "content"}
    return message


def _developer_as_system(messages: Messages) -> Messages:
    return tuple({**m, "role": "system"} if m.get("role") == "developer" else m for m in messages)


def _system_as_user(messages: Messages) -> Messages:
    """Later system messages as the user's; the first one where there are no others."""
    systems = [i for i, m in enumerate(messages) if m.get("role") == "system"]
    folded = [i for i in systems if i] or systems
    return tuple({**m, "role": "user"} if i in folded else m for i, m in enumerate(messages))


_CHANGES: tuple[tuple[str, Callable[[Messages], Messages], str], ...] = (
    ("arguments_as_text", _arguments_as_text,
     "the template takes tool calls' arguments as text: given as JSON"),
    ("content_as_parts", _content_as_parts,
     "the template takes contents as lists of parts: given as one text part each"),
    ("thought_in_field", _thought_in_field,
     "the template takes a thought in a field of its own, not between tags in the content"),
    ("thought_by_name", _thought_by_name, "the template reads a thought as `reasoning`: given by that name, too"),
    ("empty_content", _empty_content, "a missing content is given as an empty one, or the other way round"),
    ("developer_as_system", _developer_as_system, "developer messages are given as system messages"),
    ("system_as_user", _system_as_user, "system messages that come later are given as the user's"),
)  # fmt: skip
# What a template's source has to tell, for a change to be worth a trial.
_NEEDS: dict[str, Callable[[str], bool]] = {
    "content_as_parts": lambda source: any(mark in source for mark in ("'type'", '"type"', ".type")),
    "thought_in_field": lambda source: "</think>" not in source,  # else it reads the tags itself
    "thought_by_name": lambda source: re.search(r"\breasoning\b", source) is not None,
}
