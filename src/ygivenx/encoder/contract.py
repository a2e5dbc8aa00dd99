"""Which characters a model has to produce: the contract between a rendered conversation and inference.

For an assistant message i, P = render(messages[:i], add_generation_prompt=True) is what inference shows, and
F = render(messages[:i+1]). The output is O = F[len(P) : end of turn], and must satisfy: F starts with P; O ends
in the token that ends the turn. One text serves all turns if it starts with each P + O (`single`); else every
turn gets its own (`split`). What satisfies neither is refused with the place where the two texts part. The rest of
the contract, that the ids of P begin those of P + O, is checked when a candidate is encoded (weigh.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import RowError
from ..templating.origins import TEMPLATE, within
from ..templating.template import common_prefix
from ..templating.tracing import Traced
from .candidates import SHOWN, Rendering, Renderings, Turn, quoted, runs_of_message
from .ends import USER, appended_end, end_of_turn, render_or_none
from .joining import joined, position_after
from .tokens import Tokens

_STAND_IN = "\ue000"  # for private use: no template writes it
_HEADER = 256  # characters: a header is shorter
_REWRITTEN = (
    "the template writes earlier turns differently once they are history: each reply has its own sequence"
)


def prove(
    tokens: Tokens,
    rendered: Renderings,
    to_train: Iterable[int],
    repairs: frozenset[str] = frozenset(),
    forced: bool = False,
) -> list[Rendering]:
    """The texts that train the wanted messages; raises RowError where no text can."""
    text, begins = rendered.whole, rendered.renderer.begins
    turns = [_turn(tokens, rendered, i, repairs, forced) for i in to_train]
    if turns and begins(turns[-1].proven, text):  # the next header ends the last turn
        text = turns[-1].proven
    if all(begins(text, t.proven) for t in turns):
        return [Rendering(text, tuple(turns), len(rendered), rendered.traced(len(rendered)))]
    notes = (_REWRITTEN,) if len(turns) > 1 else ()
    return [
        Rendering(t.text, (t,), t.message + 1, t.traced or rendered.traced(t.message + 1), notes)
        for t in turns
    ]


def prove_as_rendered(tokens: Tokens, rendered: Renderings, to_train: Iterable[int]) -> list[Rendering]:
    """One text as the template writes the whole; outputs by the contract, else by origins, with a note."""
    text, turns = rendered.whole, []
    for i in to_train:
        try:
            turn = _turn(tokens, rendered, i)
        except RowError:
            turn = None
        if turn is None or not rendered.renderer.begins(text, turn.proven):
            turn = _by_origin(tokens, rendered, i)
        turns.append(turn)
    return [Rendering(text, tuple(turns), len(rendered), rendered.traced(len(rendered)))]


def unasked(tokens: Tokens, rendered: Renderings, to_train: Iterable[int]) -> list[int]:
    """Of the wanted replies, those before the first question for which the template writes no prompt."""
    messages = rendered.inputs.messages
    first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), len(rendered))
    return [i for i in to_train if i < first and not _is_asked(tokens, rendered, i)]


def _is_asked(tokens: Tokens, rendered: Renderings, i: int) -> bool:
    """Whether what inference shows before reply i, thoughts apart, begins what the row holds."""
    try:
        shown = rendered.prompt(i)
    except RowError:
        return False
    if _writes_header(tokens, rendered, i):
        return False
    return position_after(rendered.tags.without(shown), rendered.closed(i + 1)) is not None


# --- a turn ----------------------------------------------------------------------------------------------


def _turn(
    tokens: Tokens, rendered: Renderings, i: int, repairs: frozenset[str] = frozenset(), forced: bool = False
) -> Turn:
    """The proof for message i."""
    shown, text = _prompt(rendered, i), rendered.closed(i + 1)
    continues = rendered.renderer.begins(text, shown)
    if _writes_header(tokens, rendered, i):
        raise _no_header(i)
    first, last = _spoken(rendered, i)
    if continues and _trains_header(rendered, i, shown, text, first):
        raise _no_header(i)
    after = max(last, len(shown) if continues else 0)
    if not continues and not repairs:
        raise _not_continued(i, shown, text)
    end = end_of_turn(tokens, rendered, i, after) or appended_end(tokens, rendered, i, after, repairs)
    if not continues or forced:
        mended = joined(rendered, i, repairs, end, continues)
        if mended is not None:
            return _stopping_once(tokens, rendered, mended)
        if not continues:
            raise _not_continued(i, shown, text)
    whole = text[: end.at] + end.token if end.note else text
    notes = (end.note,) if end.note else ()
    stop = end.at + len(end.token)
    return _stopping_once(tokens, rendered, Turn(i, whole, len(shown), end.at, stop, notes=notes))


def _stopping_once(tokens: Tokens, rendered: Renderings, turn: Turn) -> Turn:
    """The turn; raises RowError if the template writes a token inside it by which generation would stop."""
    traced = turn.traced or rendered.traced(turn.message + 1)
    for found in tokens.control(turn.text, turn.start, turn.end):
        written = traced is None or TEMPLATE in within(traced.text.runs, *found.span())
        if found[0] in tokens.stops and written:
            raise RowError(
                f"the template writes {found[0]!r} inside this reply, and generation stops there",
                reason="stop_inside",
                field=f"messages[{turn.message}]",
                why="a model can't produce in one turn what stands after it",
                fix="split the message there in two, such as one with the content and one with the calls",
            )
    return turn


def _prompt(rendered: Renderings, i: int) -> str:
    try:
        return rendered.prompt(i)
    except RowError as e:
        what = "no reply can be asked for here: the template fails on what stands before it"
        fix = "give this message the weight 0, so that it is context"
        raise RowError(what, reason="no_prompt", field=f"messages[{i}]", why=e.why, fix=fix) from e


def _spoken(rendered: Renderings, i: int) -> tuple[int, int]:
    """The characters [first, stop) of F between which message i speaks; [all, 0) where origins aren't known.

    [0, 0) where F has nothing of it.
    """
    text, whole = rendered.closed(i + 1), rendered.whole
    traced = rendered.traced(len(rendered) if rendered.renderer.begins(whole, text) else i + 1)
    runs = [r for r in runs_of_message(traced, i) if r[1] <= len(text)] if traced else []
    if _answers_nothing(rendered.inputs.messages[i]):
        at = _place(rendered, i)
        runs = sorted([*runs, (at, at)])
    return (runs[0][0], runs[-1][1]) if runs else (0 if traced else len(text), 0)


# --- headers ---------------------------------------------------------------------------------------------


def _writes_header(tokens: Tokens, rendered: Renderings, i: int) -> bool:
    """Whether F begins message i, after P, as a prompt after a user ends: then nothing asks for it."""
    if i and rendered.inputs.messages[i - 1].get("role") == "user":
        return False
    shown, text = rendered.prompt(i), rendered.closed(i + 1)
    begin = len(shown) if rendered.renderer.begins(text, shown) else position_after(shown, text)
    if begin is None:
        return False
    head = text[begin : max(_spoken(rendered, i)[0], begin)].lstrip()
    prompted = render_or_none(rendered.renderer, rendered.inputs.upto(i, USER)) if head else None
    if prompted is None:
        return False
    prompted = rendered.tags.without(prompted).rstrip()
    ends = [head[:n] for n in range(1, min(len(head), _HEADER) + 1) if prompted.endswith(head[:n])]
    return any(tokens.has_control(e) or prompted[: -len(e)][-1:].isspace() for e in ends)


def _trains_header(rendered: Renderings, i: int, shown: str, text: str, first: int) -> bool:
    """Whether the template ignores add_generation_prompt, so that the header of a reply would count as output.

    What a template writes before the words of every reply, whatever it says, is the header's.
    """
    if not text[len(shown) : max(first, len(shown))].strip() or rendered.closed(i) != shown:
        return False
    plain = {"role": "assistant", "content": _STAND_IN}
    try:
        probe = rendered.renderer.render(rendered.inputs.upto(i, plain))
    except RowError:
        return False
    lead, found, _ = probe[len(shown) :].partition(_STAND_IN)
    return bool(found) and bool(rendered.tags.marks.sub("", lead).strip())


# --- a reply of no words ---------------------------------------------------------------------------------


def _answers_nothing(message: Mapping[str, Any]) -> bool:
    content = message.get("content") or ""
    return isinstance(content, str) and not content.strip() and not message.get("tool_calls")


def _place(rendered: Renderings, i: int) -> int:
    """Where in F the content of message i, which is blank, ends; raises RowError if that can't be told."""
    text, (*before, message) = rendered.closed(i + 1), rendered.inputs.upto(i + 1).messages
    said = {**message, "content": (message.get("content") or "") + _STAND_IN}
    filled = rendered.renderer.render(replace(rendered.inputs, messages=(*before, said)))
    at = filled.find(_STAND_IN)
    if at < 0 or filled[:at] + filled[at + 1 :] != text:
        what = "nothing shows where this empty reply stands: the template writes it otherwise than others"
        fix = "leave the message out, or give it the weight 0"
        raise RowError(what, reason="no_end_of_turn", field=f"messages[{i}]", fix=fix)
    return at


# --- as rendered -----------------------------------------------------------------------------------------


def _by_origin(tokens: Tokens, rendered: Renderings, i: int) -> Turn:
    """Message i where the whole text has it, if no other message speaks between its beginning and its end."""
    traced, (first, last) = rendered.traced(len(rendered)), _spoken(rendered, i)
    runs = runs_of_message(traced, i) if traced else []
    end = end_of_turn(tokens, rendered, i, last) if runs else None
    found = end and _end_in_whole(tokens, rendered, runs, rendered.closed(i + 1)[first : end.at], end.token)
    if traced is None or end is None or found is None or _others(rendered, traced, i, runs[0][0], found):
        what = "the rendered text doesn't say where this reply begins and ends"
        raise RowError(what, reason="no_origin", field=f"messages[{i}]", fix="use context='inference'")
    start = _after_prompt(tokens, rendered, traced, i, runs[0][0])
    note = f"messages[{i}]: as rendered, which differs from what inference shows"
    return Turn(i, rendered.whole, start, found, found + len(end.token), notes=(note,))


def _end_in_whole(
    tokens: Tokens, rendered: Renderings, runs: list[tuple[int, int]], said: str, token: str
) -> int | None:
    """Where the token that ends F's message ends it in the whole text: after the same words, or after its last."""
    at = runs[0][0]
    if rendered.renderer.begins(rendered.whole[at:], said + token):
        return at + len(said)
    return next((m.start() for m in tokens.control(rendered.whole, runs[-1][1]) if m[0] == token), None)


def _others(rendered: Renderings, traced: Traced, i: int, start: int, stop: int) -> bool:
    """Whether a message other than i speaks in [start, stop)."""
    others = (run for j in range(len(rendered)) if j != i for run in runs_of_message(traced, j))
    return any(a < stop and b > start for a, b in others)


def _after_prompt(tokens: Tokens, rendered: Renderings, traced: Traced, i: int, first: int) -> int:
    """Where message i, which speaks from `first` on, begins in the whole text: after what its prompt ends with.

    That is after the last words of the messages before it, up to the special token with which the text parts from it;
    `first` itself where it parts without one.
    """
    shown, tags, whole = rendered.traced_prompt(i), rendered.tags, rendered.whole
    before = [run for j in range(i) for run in runs_of_message(shown, j)] if shown else []
    spoken = [b for j in range(i) for _, b in runs_of_message(traced, j) if b <= first]
    tail = rendered.prompt(i)[max((b for _, b in before), default=0) :]
    at = max(spoken, default=0)
    for begun in (tail, tags.opened.sub("", tail), tags.closed.sub("", tail)):
        if whole[at:first].startswith(begun):
            return at + len(begun)
    part = at + common_prefix(whole[at:first], tail)
    parting = (m.start() for m in tokens.control(whole, at, first) if m.start() <= part < m.end())
    return next(parting, first)


# --- refusals --------------------------------------------------------------------------------------------


def _no_header(i: int) -> RowError:
    return RowError(
        "no reply can be asked for here: the template writes its header only with the reply",
        reason="no_prompt",
        field=f"messages[{i}]",
        why="the prompt that inference shows ends before it, so that the header would count as the model's output",
        fix="give this message the weight 0, so that it is context, or make it one with the reply before it",
    )


def _not_continued(i: int, shown: str, text: str) -> RowError:
    at = common_prefix(shown, text)
    return RowError(
        "what the row holds doesn't continue what inference shows before this reply",
        reason="not_continued",
        field=f"messages[{i}]",
        why=f"after {quoted(shown[max(0, at - SHOWN) : at])} inference shows {quoted(shown[at:])} where "
        f"the rendered row has {quoted(text[at:])}",
        fix="make the reply begin as the prompt does",
    )
