"""Which characters a model has to produce: the contract between a rendered conversation and inference.

For an assistant message i, P = render(messages[:i], add_generation_prompt=True) is what inference shows, and
F = render(messages[:i+1]). The output is O = F[len(P) : end of turn], and must satisfy: F starts with P; O ends
in the token that ends the turn. One text serves all turns if it starts with each P + O (`single`); else every
turn gets its own (`split`). What satisfies neither is refused with the place where the two texts part.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import RowError
from .closing import End, end_of_turn
from .joining import joined
from .renderings import Draft, Row, Turn, common_prefix, runs_of_message
from .tokens import Tokens

_REWRITTEN = (
    "the template writes earlier turns differently once they are history: each reply has its own sequence"
)
_SHOWN = 40  # characters of a text that an error quotes


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
        return [
            Draft(t.text, (t,), t.message + 1, t.traced or row.traced(t.message + 1), (_REWRITTEN,))
            for t in turns
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
        closed = self._end(row, i, after, "append_end" in repairs)
        if not continues:
            mended = joined(row, i, repairs, closed)
            if mended is None:
                raise _not_continued(i, shown, text)
            return mended
        end, token, note = closed
        whole = text[:end] + token if note else text
        return Turn(i, whole, len(shown), end, end + len(token), notes=(note,) if note else ())

    def _end(self, row: Row, i: int, after: int, append: bool) -> End:
        found = end_of_turn(self.tokens, row, i, after)
        if found is not None:
            return found
        eos = self.tokens.tokenizer.eos_token
        if not append:
            raise RowError(
                "nothing ends this turn",
                reason="no_end_of_turn",
                field=f"messages[{i}]",
                why=f"after it the template writes {_quoted(row.closed(i + 1)[after:])}: a model trained on it "
                "never stops",
                fix=f"repair='append_end' appends {eos!r}, or give another template",
            )
        if not eos:
            what = "append_end needs an eos token, and the tokenizer has none"
            raise RowError(
                what, reason="no_end_of_turn", field=f"messages[{i}]", fix="set tokenizer.eos_token"
            )
        return End(after, eos, f"messages[{i}]: {eos!r} was appended, as nothing ends the turn")

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


def _not_continued(i: int, shown: str, text: str) -> RowError:
    at = common_prefix(shown, text)
    return RowError(
        "what the row holds doesn't continue what inference shows before this reply",
        reason="not_continued",
        field=f"messages[{i}]",
        why=f"after {_quoted(shown[max(0, at - _SHOWN) : at])} inference shows {_quoted(shown[at:])} where "
        f"the rendered row has {_quoted(text[at:])}",
        fix="make the reply begin as the prompt does, or choose a repair: see repair=",
    )


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN else repr(text[:_SHOWN]) + "…"
