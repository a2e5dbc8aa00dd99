"""The token that ends a turn.

Let e be after the last character that comes from message i in F, G the next rendering (the next prompt, else one with
what could come next), L how much of F and G is the same. Of the special tokens in F[e:L] the first that is known to
stop generation ends the turn, else the last; else, in F[e:], the first that is known, else the first; else, where F
ends there and G goes on with a special token, that one: the next header ends the turn. Where nothing does, a repair
may put the token there by which generation would stop. A template may write the next prompt unasked, as Llama 3's first
one, or a part of it: then, where no stop is known, a token that begins turns is none that ends one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import RowError
from .renderings import Row, quoted, runs_of_message
from .tokens import Tokens
from .tracing import marked


class End(NamedTuple):
    """Where the token that ends a turn stands in F, or is put; the note says why if F doesn't have it there."""

    at: int
    token: str
    note: str = ""


def end_of_turn(tokens: Tokens, row: Row, i: int, after: int) -> End | None:
    """What ends message i, whose last character stands before `after` in F."""
    text = row.closed(i + 1)
    then = or_none(lambda: _next(row, i)) or ""
    found = _closing(tokens, row, i, then, after) or _next_header(tokens, row, i, after)
    if found is None or found.at < len(text):
        return found
    return found._replace(note=f"messages[{i}]: the header of the next turn, {found.token!r}, ends it")


def appended_end(tokens: Tokens, row: Row, i: int, after: int, repairs: frozenset[str]) -> End:
    """The eos, put after message i, of which the template writes no more than white space; raises RowError."""
    eos, rest, field = tokens.tokenizer.eos_token, row.closed(i + 1)[after:], f"messages[{i}]"
    what, why = "nothing ends this turn", "a model trained on it never stops"
    if rest.strip():
        fix = "if one of it ends a turn, name its token: stops=[...]; or give another template"
        why = f"after it the template writes {quoted(rest)}, of which nothing is known to stop generation: {why}"
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix=fix)
    if not eos:
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix="set tokenizer.eos_token")
    needed = "append_end" if len(tokens.stops) > 1 else "only_end"
    if not repairs & {needed, "append_end"}:
        why = f"any of {', '.join(sorted(tokens.stops))} could, and none is written: {why}"
        fix = f"repair={needed!r} appends {eos!r}, or give another template"
        raise RowError(what, reason="no_end_of_turn", field=field, why=why, fix=fix)
    return End(after, eos, f"{field}: {eos!r} was appended, as nothing ends the turn")


def _next(row: Row, i: int) -> str:
    """The prompt of the next reply; where no message asks for it, the one after a user, or its tool calls' results."""
    following = next((j for j in row.replies() if j > i), len(row))
    if i + 1 < len(row) and following != i + 1:
        return row.prompt(following)
    calls = row.inputs.messages[i].get("tool_calls") or []
    more = [_result(c) for c in calls] or [USER]
    return row.template.render(row.inputs.upto(i + 1, *more), add_generation_prompt=True)


def _closing(tokens: Tokens, row: Row, i: int, then: str, after: int) -> End | None:
    text = row.closed(i + 1)
    common = row.common_prefix(text, then)
    inside = tokens.control(text, after)
    shared = [m for m in inside if m.end() <= common]
    known = any(m[0] in tokens.stops for m in shared or inside)
    if not known and common >= after and text[common:].strip() and _asks(row, i + 1, text):
        beginning = _beginning(tokens, row, i)
        shared = [m for m in shared if m[0] not in beginning]
        if len(shared) != 1:
            return None
    for found, fallback in ((shared, -1), (inside, 0)):
        stops = [m for m in found if m[0] in tokens.stops]
        if found:
            end = stops[0] if stops else found[fallback]
            if not shared and not stops and _begins_next(row, i, text[end.start() :]):
                return None
            return End(end.start(), end[0])
    header = next(iter(tokens.control(then, common)), None)
    if header is not None and header.start() == common == len(text):
        return End(len(text), header[0])
    return None


def _asks(row: Row, i: int, text: str) -> bool:
    """Whether the prompt of message i begins with a text."""
    prompt = or_none(lambda: row.prompt(i))
    return prompt is not None and row.begins(prompt, text)


def _begins_next(row: Row, i: int, rest: str) -> bool:
    """Whether the prompt after a user, who follows message i, ends as F does: then no turn ends there."""
    asked = or_none(lambda: row.template.render(row.inputs.upto(i + 1, USER), add_generation_prompt=True))
    return asked is not None and asked.endswith(rest)


def _beginning(tokens: Tokens, row: Row, i: int) -> set[str]:
    """The special tokens before anything that a message says; all of them where that isn't known."""
    traced = row.traced(i + 1)
    runs = [run for j in range(i + 1) for run in runs_of_message(traced, j)] if traced else []
    return {m[0] for m in tokens.control(row.closed(i + 1), 0, min(runs)[0] if runs else None)}


def _next_header(tokens: Tokens, row: Row, i: int, after: int) -> End | None:
    """The special token that follows message i once it is history, where F itself ends with its text."""
    text, then = row.closed(i + 1), row.inputs.upto(i + 1, USER)
    plain = or_none(lambda: row.template.render(then, add_generation_prompt=True))
    traced = row.template.trace(marked(then), plain, add_generation_prompt=True) if plain else None
    runs = runs_of_message(traced, i) if traced else []
    if text[after:].strip() or not runs or plain is None:
        return None
    gap = next(iter(tokens.control(plain, runs[-1][1])), None)
    return End(len(text), gap[0]) if gap and not plain[runs[-1][1] : gap.start()].strip() else None


USER = {"role": "user", "content": "x"}


def _result(call: dict[str, Any]) -> dict[str, Any]:
    name = call.get("function", call).get("name", "f")
    made = {"role": "tool", "name": name, "content": "x"}
    return made | ({"tool_call_id": call["id"]} if "id" in call else {})


def or_none(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except RowError:
        return None
