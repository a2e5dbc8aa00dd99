"""Which characters a model has to produce: the contract between a rendered conversation and inference.

For an assistant message i, P = render(messages[:i], add_generation_prompt=True) is what inference shows, and
F = render(messages[:i+1]). The output is O = F[len(P) : end of turn], and must satisfy: F starts with P; O ends
in the token that ends the turn. One text serves all turns if it starts with each P + O (`single`); else every
turn gets its own (`split`). What satisfies neither is refused with the place where the two texts part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import RowError
from .closing import USER, appended_end, end_of_turn, or_none
from .joining import beyond, joined
from .origins import TEMPLATE, within
from .renderings import SHOWN, Draft, Row, Turn, common_prefix, quoted, runs_of_message
from .repair import CLOSED, OPENED
from .tokens import Tokens
from .tracing import Traced

_STAND_IN = "\ue000"  # for private use: no template writes it
_HEADER = 256  # characters: a header is shorter
_REWRITTEN = (
    "the template writes earlier turns differently once they are history: each reply has its own sequence"
)


class Contract:
    """Proves the turns of conversations for one tokenizer."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def drafts(self, row: Row, wanted: Iterable[int], repairs: frozenset[str] = frozenset()) -> list[Draft]:
        """The texts that train the wanted messages; raises RowError where no text can."""
        text = row.whole
        turns = [self.turn(row, i, repairs) for i in wanted]
        if turns and row.begins(turns[-1].proven, text):  # the next header ends the last turn
            text = turns[-1].proven
        if all(row.begins(text, t.proven) for t in turns):
            return [Draft(text, tuple(turns), len(row), row.traced(len(row)))]
        notes = (_REWRITTEN,) if len(turns) > 1 else ()
        return [
            Draft(t.text, (t,), t.message + 1, t.traced or row.traced(t.message + 1), notes) for t in turns
        ]

    def rendered(self, row: Row, wanted: Iterable[int]) -> list[Draft]:
        """One text as the template writes the whole; outputs by the contract, else by origins, with a note."""
        text, turns = row.whole, []
        for i in wanted:
            try:
                turn = self.turn(row, i)
            except RowError:
                turn = None
            if turn is None or not row.begins(text, turn.proven):
                turn = self._by_origin(row, i)
            turns.append(turn)
        return [Draft(text, tuple(turns), len(row), row.traced(len(row)))]

    def _by_origin(self, row: Row, i: int) -> Turn:
        """Message i where the whole text has it, if no other message speaks between its beginning and its end."""
        traced, (first, last) = row.traced(len(row)), self._said(row, i)
        runs = runs_of_message(traced, i) if traced else []
        end = end_of_turn(self.tokens, row, i, last) if runs else None
        found = end and self._end_in_whole(row, runs, row.closed(i + 1)[first : end.at], end.token)
        if traced is None or end is None or found is None or _others(row, traced, i, runs[0][0], found):
            what = "the rendered text doesn't say where this reply begins and ends"
            raise RowError(what, reason="no_origin", field=f"messages[{i}]", fix="use context='inference'")
        start = _after_prompt(self.tokens, row, traced, i, runs[0][0])
        note = f"messages[{i}]: as rendered, which differs from what inference shows"
        return Turn(i, row.whole, start, found, found + len(end.token), notes=(note,))

    def _end_in_whole(self, row: Row, runs: list[tuple[int, int]], said: str, token: str) -> int | None:
        """Where the token that ends F's message ends it in the whole text: after the same words, or after its last."""
        at = runs[0][0]
        if row.begins(row.whole[at:], said + token):
            return at + len(said)
        return next((m.start() for m in self.tokens.control(row.whole, runs[-1][1]) if m[0] == token), None)

    def turn(self, row: Row, i: int, repairs: frozenset[str] = frozenset()) -> Turn:
        """The proof for message i."""
        shown, text = self._prompt(row, i), row.closed(i + 1)
        continues = row.begins(text, shown)
        if self._writes_header(row, i):
            raise _no_header(i)
        after = max(self._said(row, i)[1], len(shown) if continues else 0)
        if not continues and not repairs:
            raise _not_continued(i, shown, text)
        found = end_of_turn(self.tokens, row, i, after)
        closed = found or appended_end(self.tokens, row, i, after, repairs)
        if not continues:
            mended = joined(row, i, repairs, closed)
            if mended is None:
                raise _not_continued(i, shown, text)
            return self._stopping_once(row, mended)
        end, token, note = closed
        whole = text[:end] + token if note else text
        notes = (note,) if note else ()
        return self._stopping_once(row, Turn(i, whole, len(shown), end, end + len(token), notes=notes))

    def _stopping_once(self, row: Row, turn: Turn) -> Turn:
        """The turn; raises RowError if the template writes a token inside it by which generation would stop."""
        traced = turn.traced or row.traced(turn.message + 1)
        for found in self.tokens.control(turn.text, turn.start, turn.end):
            written = traced is None or TEMPLATE in within(traced.text.runs, *found.span())
            if found[0] in self.tokens.stops and written:
                raise RowError(
                    f"the template writes {found[0]!r} inside this reply, and generation stops there",
                    reason="stop_inside",
                    field=f"messages[{turn.message}]",
                    why="a model can't produce in one turn what stands after it",
                    fix="split the message there in two, such as one with the content and one with the calls",
                )
        return turn

    def unasked(self, row: Row, wanted: Iterable[int]) -> list[int]:
        """Of the wanted replies, those before the first question for which the template writes no prompt."""
        first = next((i for i, m in enumerate(row.inputs.messages) if m.get("role") == "user"), len(row))
        return [i for i in wanted if i < first and (_fails(row.prompt, i) or self._writes_header(row, i))]

    def _writes_header(self, row: Row, i: int) -> bool:
        """Whether F begins message i, after P, as a prompt after a user ends: then nothing asks for it."""
        if i and row.inputs.messages[i - 1].get("role") == "user":
            return False
        shown, text = row.prompt(i), row.closed(i + 1)
        begin = len(shown) if row.begins(text, shown) else beyond(shown, text)
        if begin is None:
            return False
        head = text[begin : max(self._said(row, i)[0], begin)].lstrip()
        after_user = row.inputs.upto(i, USER)
        asked = or_none(lambda: row.template.render(after_user, add_generation_prompt=True)) if head else None
        if asked is None:
            return False
        asked = CLOSED.sub("", OPENED.sub("", asked)).rstrip()
        ends = [head[:n] for n in range(1, min(len(head), _HEADER) + 1) if asked.endswith(head[:n])]
        return any(self.tokens.has_control(e) or asked[: -len(e)][-1:].isspace() for e in ends)

    def _prompt(self, row: Row, i: int) -> str:
        try:
            return row.prompt(i)
        except RowError as e:
            what = "no reply can be asked for here: the template fails on what stands before it"
            fix = "give this message the weight 0, so that it is context"
            raise RowError(what, reason="no_prompt", field=f"messages[{i}]", why=e.why, fix=fix) from e

    def _said(self, row: Row, i: int) -> tuple[int, int]:
        """The characters [first, stop) of F between which message i speaks; [all, 0) where origins aren't known.

        [0, 0) where F has nothing of it.
        """
        text, whole = row.closed(i + 1), row.whole
        traced = row.traced(len(row) if row.begins(whole, text) else i + 1)
        runs = [r for r in runs_of_message(traced, i) if r[1] <= len(text)] if traced else []
        if _answers_nothing(row.inputs.messages[i]):
            at = _place(row, i)
            runs = sorted([*runs, (at, at)])
        return (runs[0][0], runs[-1][1]) if runs else (0 if traced else len(text), 0)


def _others(row: Row, traced: Traced, i: int, start: int, stop: int) -> bool:
    """Whether a message other than i speaks in [start, stop)."""
    others = (run for j in range(len(row)) if j != i for run in runs_of_message(traced, j))
    return any(a < stop and b > start for a, b in others)


def _after_prompt(tokens: Tokens, row: Row, traced: Traced, i: int, first: int) -> int:
    """Where message i, which speaks from `first` on, begins in the whole text: after what its prompt ends with.

    That is after the last words of the messages before it, up to the special token with which the text parts from it;
    `first` itself where it parts without one.
    """
    shown = row.traced_prompt(i)
    before = [run for j in range(i) for run in runs_of_message(shown, j)] if shown else []
    spoken = [b for j in range(i) for _, b in runs_of_message(traced, j) if b <= first]
    tail = row.prompt(i)[max((b for _, b in before), default=0) :]
    at = max(spoken, default=0)
    for begun in (tail, OPENED.sub("", tail), CLOSED.sub("", tail)):
        if row.whole[at:first].startswith(begun):
            return at + len(begun)
    part = at + common_prefix(row.whole[at:first], tail)
    parting = (m.start() for m in tokens.control(row.whole, at, first) if m.start() <= part < m.end())
    return next(parting, first)


def _answers_nothing(message: Mapping[str, Any]) -> bool:
    content = message.get("content") or ""
    return isinstance(content, str) and not content.strip() and not message.get("tool_calls")


def _place(row: Row, i: int) -> int:
    """Where in F the content of message i, which is blank, ends; raises RowError if that can't be told."""
    text, (*before, message) = row.closed(i + 1), row.inputs.upto(i + 1).messages
    said = {**message, "content": (message.get("content") or "") + _STAND_IN}
    filled = row.template.render(replace(row.inputs, messages=(*before, said)))
    at = filled.find(_STAND_IN)
    if at < 0 or filled[:at] + filled[at + 1 :] != text:
        what = "nothing shows where this empty reply stands: the template writes it otherwise than others"
        fix = "leave the message out, or give it the weight 0"
        raise RowError(what, reason="no_end_of_turn", field=f"messages[{i}]", fix=fix)
    return at


def _fails(render: Callable[[int], str], i: int) -> bool:
    try:
        render(i)
    except RowError:
        return True
    return False


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
        fix="make the reply begin as the prompt does, or choose a repair: see repair=",
    )
