"""Which characters a model has to produce: the contract between a rendered conversation and inference.

For an assistant message i, P = render(messages[:i], add_generation_prompt=True) is what inference shows, and
F = render(messages[:i+1]). The output is O = F[len(P) : end of turn], and must satisfy: F starts with P; O ends
in the token that ends the turn. One text serves all turns if it starts with each P + O (`single`); else every
turn gets its own (`split`). What satisfies neither is refused with the place where the two texts part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import RowError
from .closing import appended_end, end_of_turn
from .joining import joined
from .renderings import SHOWN, Draft, Row, Turn, common_prefix, quoted, runs_of_message
from .tokens import Tokens

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
        traced = row.traced(len(row))
        runs = runs_of_message(traced, i) if traced else []
        end = next(iter(self.tokens.control(row.whole, runs[-1][1])), None) if runs else None
        if end is None:
            what = "the rendered text doesn't say where this reply begins and ends"
            raise RowError(what, reason="no_origin", field=f"messages[{i}]", fix="use context='inference'")
        note = f"messages[{i}]: as rendered, which differs from what inference shows"
        return Turn(i, row.whole, runs[0][0], end.start(), end.end(), notes=(note,))

    def turn(self, row: Row, i: int, repairs: frozenset[str] = frozenset()) -> Turn:
        """The proof for message i."""
        shown, text = self._prompt(row, i), row.closed(i + 1)
        continues = row.begins(text, shown)
        after = max(self.last_character(row, i), len(shown) if continues else 0)
        if not continues and not repairs:
            raise _not_continued(i, shown, text)
        found = end_of_turn(self.tokens, row, i, after)
        closed = found or appended_end(self.tokens, row, i, after, repairs)
        if not continues:
            mended = joined(row, i, repairs, closed)
            if mended is None:
                raise _not_continued(i, shown, text)
            return mended
        end, token, note = closed
        whole = text[:end] + token if note else text
        return Turn(i, whole, len(shown), end, end + len(token), notes=(note,) if note else ())

    def unasked(self, row: Row, wanted: Iterable[int]) -> list[int]:
        """Of the wanted replies, those before the first question for which the template can write no prompt."""
        first = next((i for i, m in enumerate(row.inputs.messages) if m.get("role") == "user"), len(row))
        return [i for i in wanted if i < first and _fails(row.prompt, i)]

    def _prompt(self, row: Row, i: int) -> str:
        try:
            return row.prompt(i)
        except RowError as e:
            what = "no reply can be asked for here: the template fails on what stands before it"
            fix = "give this message the weight 0, so that it is context"
            raise RowError(what, reason="no_prompt", field=f"messages[{i}]", why=e.why, fix=fix) from e

    def last_character(self, row: Row, i: int) -> int:
        """One past the last character of F that comes from message i, as far as origins are known."""
        text, whole = row.closed(i + 1), row.whole
        traced = row.traced(len(row) if row.begins(whole, text) else i + 1)
        if traced is None:
            return 0
        ends = [stop for _, stop in runs_of_message(traced, i) if stop <= len(text)]
        return ends[-1] if ends else 0


def _fails(render: Callable[[int], str], i: int) -> bool:
    try:
        render(i)
    except RowError:
        return True
    return False


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
