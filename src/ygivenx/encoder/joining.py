"""Repairs inside a turn: the reply put after its prompt by hand, where a repair allows it."""

from __future__ import annotations

from .closing import End
from .origins import join
from .renderings import Row, Turn
from .repair import OPENED, own_reasoning
from .tracing import Traced

_CLOSE = "\n</think>\n\n"


def joined(row: Row, i: int, repairs: frozenset[str], closed: End) -> Turn | None:
    """P with the reply put after it by hand, where a repair allows it; `closed` is what ends the reply in F."""
    shown, text = row.prompt(i), row.closed(i + 1)
    opened, begin = OPENED.search(shown), _beyond(shown, text)
    end, token = closed
    if opened and (said := _thought(row, i, text.startswith(shown[: opened.start()]), repairs)):
        what, parts = said
    elif "whitespace" in repairs and begin is not None:
        whole = row.traced(i + 1)
        parts = [(whole.text if whole else text)[begin:end].lstrip()]
        what = "its prompt differs from the rendered row in white space alone, and is kept"
    else:
        return None
    prompt = row.template.trace(row.marked.upto(i), shown, add_generation_prompt=True)
    traced = prompt and Traced(join([prompt.text, *parts, token]), prompt.sources)
    stop = len(shown) + sum(map(len, parts))
    note = f"messages[{i}]: {what}; the ids differ from the template's"
    return Turn(i, "".join([shown, *parts, token]), len(shown), stop, stop + len(token), traced, (note,))


def _beyond(shown: str, text: str) -> int | None:
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
