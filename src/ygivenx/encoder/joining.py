"""Repairs inside a turn: the reply put after its prompt by hand, where a repair allows it."""

from __future__ import annotations

from .closing import End
from .origins import join
from .renderings import Row, Turn, runs_of_message
from .repair import CLOSED, OPENED, own_reasoning
from .tracing import Traced

_CLOSE = "\n</think>\n\n"
_KEPT = "differs from the rendered row in {}, and is kept"


def joined(row: Row, i: int, repairs: frozenset[str], closed: End) -> Turn | None:
    """P with the reply put after it by hand, where a repair allows it; `closed` is what ends the reply in F."""
    shown, (_, token, ending) = row.prompt(i), closed
    said = _reply(row, i, repairs, closed[0])
    if said is None:
        return None
    what, parts = said
    prompt = row.traced_prompt(i)
    traced = prompt and Traced(join([prompt.text, *parts, token]), prompt.sources)
    stop = len(shown) + sum(map(len, parts))
    notes = (f"messages[{i}]: {what}; the ids differ from the template's", *([ending] if ending else []))
    return Turn(i, "".join([shown, *parts, token]), len(shown), stop, stop + len(token), traced, notes)


def _reply(row: Row, i: int, repairs: frozenset[str], end: int) -> tuple[str, list[str]] | None:
    """What is done, and the reply that goes after P; in F it ends at `end`."""
    shown, text = row.prompt(i), row.closed(i + 1)
    opened = OPENED.search(shown)
    if opened and (said := _thought(row, i, text.startswith(shown[: opened.start()]), repairs)):
        return said
    if "closed_think" in repairs and (begin := _after_closed(shown, text)) is not None:
        whole = row.traced(i + 1)
        what = f"its prompt {_KEPT.format('an empty thought that it closes itself')}"
        return (what, [(whole.text if whole else text)[begin:end]]) if begin <= end else None
    if "whitespace" in repairs and (begin := beyond(shown, text)) is not None:
        parts = _said_beyond(row, i, begin, end)
        return (f"its prompt {_KEPT.format('white space alone')}", parts) if parts else None
    whole = row.traced(i + 1) if "history" in repairs else None
    if whole and (begin := _after_last(row, whole, i)) is not None and begin <= end:
        where = "what stands before the last message"
        return f"its prompt {_KEPT.format(where)}", [whole.text[begin:end]]
    return None


def _after_closed(shown: str, text: str) -> int | None:
    """Where the reply begins in F, if P says the same before it, then thinks nothing, and the reply doesn't think."""
    empty = CLOSED.search(shown)
    if not empty or not text.startswith(shown[: empty.start()]):
        return None
    return None if text.startswith("<think>", empty.start()) else empty.start()


def beyond(shown: str, text: str) -> int | None:
    """How much of `text` says all of `shown`, white space apart; None if it doesn't begin with it."""
    wanted, have = "".join(shown.split()), 0
    for at, character in enumerate(text):
        if have == len(wanted):
            return at
        if not character.isspace():
            if character != wanted[have]:
                return None
            have += 1
    return None


def _said_beyond(row: Row, i: int, begin: int, end: int) -> list[str] | None:
    """F[begin:end] without the template's own white space before the reply; None where that can't be told."""
    whole = row.traced(i + 1)
    if whole is None or begin > end:
        return None
    first = next((start for start, _ in runs_of_message(whole, i)), end)
    return [whole.text[begin:first].lstrip(), whole.text[first:end]] if begin <= first <= end else None


def _after_last(row: Row, whole: Traced, i: int) -> int | None:
    """Where in F the reply begins, if from the first character of the last message before it F goes on as P does.

    Such a template writes what is further back otherwise once the reply stands there: a system prompt, for one, only
    with the user's message that comes last.
    """
    prompt = row.traced_prompt(i)
    if prompt is None or i - 1 in row.replies():  # between two replies nothing asks for one
        return None
    here, there = runs_of_message(prompt, i - 1), runs_of_message(whole, i - 1)
    if not here or not there:
        return None
    tail, at = str(prompt.text)[here[0][0] :], there[0][0]
    return at + len(tail) if str(whole.text).startswith(tail, at) else None


def _thought(row: Row, i: int, continues: bool, repairs: frozenset[str]) -> tuple[str, list[str]] | None:
    """What is done with the <think> that the prompt opens, and the reply that follows it."""
    message = row.inputs.messages[i]
    own, content = own_reasoning(message), message.get("content") or ""
    if message.get("tool_calls") or not isinstance(content, str):
        return None
    if own and "open_think" in repairs:
        name = "reasoning_content" if message.get("reasoning_content") else "content"
        said: list[str] = [row.said(own[0], i, name), _CLOSE, row.said(own[1], i, "content")]
        return "its own reasoning continues the <think> that the prompt opens", said
    if not own and continues and "empty_think" in repairs:
        return "the <think> that the prompt opens is closed at once", [
            _CLOSE,
            row.said(content, i, "content"),
        ]
    return None
