"""Repairs inside a turn: the reply put after its prompt by hand, where a repair allows it."""

from __future__ import annotations

from ..templating.origins import join
from ..templating.tracing import Traced
from .candidates import Renderings, Turn, runs_of_message
from .ends import End

_KEPT = "its prompt differs from the rendered row in {}, and is kept"


def joined(rendered: Renderings, i: int, repairs: frozenset[str], end: End, continues: bool) -> Turn | None:
    """P with the reply put after it by hand, where a repair allows it; `end` is what ends the reply in F.

    continues: whether F begins with P; then nothing but a thought is put together.
    """
    shown = rendered.prompt(i)
    if rendered.tags.opened.search(shown) and (
        turn := _after_open_thought(rendered, i, repairs, end, continues)
    ):
        return turn
    if continues:
        return None
    kept = _kept_prompt(rendered, i, repairs, end.at)
    return kept and _put_together(rendered, i, *kept, end)


def _put_together(
    rendered: Renderings, i: int, what: str, parts: list[str], end: End, is_apart: bool = False
) -> Turn:
    shown, prompt = rendered.prompt(i), rendered.traced_prompt(i)
    traced = prompt and Traced(join([prompt.text, *parts, end.token]), prompt.sources)
    stop = len(shown) + sum(map(len, parts))
    notes = (f"messages[{i}]: {what}; the ids differ from the template's", *([end.note] if end.note else []))
    text = "".join([shown, *parts, end.token])
    return Turn(i, text, len(shown), stop, stop + len(end.token), traced, notes, is_apart)


# --- a thought that the prompt opens ---------------------------------------------------------------------


def _after_open_thought(
    rendered: Renderings, i: int, repairs: frozenset[str], end: End, continues: bool
) -> Turn | None:
    """The reply's own reasoning after the thought that the prompt opens; or that thought closed at once."""
    shown, message = rendered.prompt(i), rendered.inputs.messages[i]
    pair = rendered.tags.pair_of(shown)
    own = rendered.tags.own_thought(message, pair)
    if own and "open_think" in repairs and not message.get("tool_calls"):
        field = "reasoning_content" if own[0] else "content"
        reasoning = rendered.text_of(own[0], i, field)
        parts = [reasoning, own[1], rendered.text_of(own[2], i, "content")]
        what = f"its own reasoning continues the {pair[0]} that the prompt opens"
        return _put_together(rendered, i, what, [p for p in parts if p], end)
    if own or "empty_think" not in repairs or rendered.tags.thinks(message):
        return None
    what = f"the {pair[0]} that the prompt opens is closed at once, encoded apart"
    if continues:
        return _put_together(
            rendered, i, what, _written_after(rendered, i, len(shown), end.at), end, is_apart=True
        )
    content = message.get("content") or ""
    if message.get("tool_calls") or not isinstance(content, str):
        return None
    parts = [f"\n{pair[1]}\n\n", rendered.text_of(content, i, "content")]
    return _put_together(rendered, i, what, parts, end, is_apart=True)


def _written_after(rendered: Renderings, i: int, begin: int, stop: int) -> list[str]:
    """F[begin:stop], with its origins where they are known."""
    whole = rendered.traced(i + 1)
    return [(whole.text if whole else rendered.closed(i + 1))[begin:stop]]


# --- a prompt that the row writes otherwise --------------------------------------------------------------


def _kept_prompt(
    rendered: Renderings, i: int, repairs: frozenset[str], end: int
) -> tuple[str, list[str]] | None:
    """What is kept of the prompt, and the reply that goes after it; in F it ends at `end`."""
    shown, text = rendered.prompt(i), rendered.closed(i + 1)
    if "closed_think" in repairs and (begin := _after_closed(rendered, shown, text)) is not None:
        what = _KEPT.format("an empty thought that it closes itself")
        return (what, _written_after(rendered, i, begin, end)) if begin <= end else None
    lacks_thought = rendered.tags.opened.search(shown) and not rendered.tags.thinks(
        rendered.inputs.messages[i]
    )
    if "whitespace" in repairs and not lacks_thought and (begin := position_after(shown, text)) is not None:
        parts = _reply_beyond(rendered, i, begin, end)
        return (_KEPT.format("white space alone"), parts) if parts else None
    begin = _after_last(rendered, i) if "history" in repairs else None
    if begin is not None and begin <= end:
        return _KEPT.format("what stands before the last message"), _written_after(rendered, i, begin, end)
    return None


def _after_closed(rendered: Renderings, shown: str, text: str) -> int | None:
    """Where the reply begins in F, if P says the same before it, then thinks nothing, and the reply doesn't think."""
    empty = rendered.tags.closed.search(shown)
    if not empty or not text.startswith(shown[: empty.start()]):
        return None
    return None if rendered.tags.marks.match(text, empty.start()) else empty.start()


def position_after(shown: str, text: str) -> int | None:
    """How much of `text` says all of `shown`, white space apart; None if it doesn't begin with it."""
    expected, have = "".join(shown.split()), 0
    for at, character in enumerate(text):
        if have == len(expected):
            return at
        if not character.isspace():
            if character != expected[have]:
                return None
            have += 1
    return None


def _reply_beyond(rendered: Renderings, i: int, begin: int, end: int) -> list[str] | None:
    """F[begin:end] without the template's own white space before the reply; None where that can't be told."""
    whole = rendered.traced(i + 1)
    if whole is None or begin > end:
        return None
    first = next((start for start, _ in runs_of_message(whole, i)), end)
    return [whole.text[begin:first].lstrip(), whole.text[first:end]] if begin <= first <= end else None


def _after_last(rendered: Renderings, i: int) -> int | None:
    """Where in F the reply begins, if from the first character of the last message before it F goes on as P does.

    Such a template writes what is further back otherwise once the reply stands there: a system prompt, for one, only
    with the user's message that comes last.
    """
    whole, prompt = rendered.traced(i + 1), rendered.traced_prompt(i)
    if (
        whole is None or prompt is None or i - 1 in rendered.replies()
    ):  # between two replies nothing asks for one
        return None
    here, there = runs_of_message(prompt, i - 1), runs_of_message(whole, i - 1)
    if not here or not there:
        return None
    tail, at = str(prompt.text)[here[0][0] :], there[0][0]
    return at + len(tail) if str(whole.text).startswith(tail, at) else None
