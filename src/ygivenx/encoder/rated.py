"""Rows whose replies are rated to examples: each reply is encoded and proven like a row of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

from ..errors import RowError
from ..rows.data import Row
from ..rows.formats import Preference, Rated, TokenRow
from ..sequence import Example, RatedExample, Rejected
from .encode import Encoder, noun_of


class PreferenceEncoder:
    """Encodes rows with rated replies: preferences, labels, best-of-n lists, token ids with rewards or advantages.

    encoder: its options hold for every reply, and so does its contract. A row is refused as a whole where one of
    its replies is.

        rated = yx.PreferenceEncoder(yx.Encoder(tokenizer))
        example = rated({"prompt": "2+2=", "chosen": "4", "rejected": "5"})
        example.replies[0].trained, example.rewards
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    def __call__(self, row: Any) -> RatedExample:
        """One row (a mapping, Preference, Rated, TokenRow or data.Row); raises RowError."""
        (done,) = self.each([row])
        if isinstance(done, RowError):
            raise done
        return done if isinstance(row, Row) else replace(done, index=None)

    def batch(self, rows: Iterable[Any], *, processes: int = 1) -> tuple[list[RatedExample], list[Rejected]]:
        """Examples and rejected rows, each in order; together as many as there were rows. See `Encoder.batch`."""
        rows = list(rows)
        done = self.each(rows, processes)
        refused = [(r, d) for r, d in zip(rows, done, strict=True) if isinstance(d, RowError)]
        examples = [d for d in done if isinstance(d, RatedExample)]
        return examples, [Rejected(_raw(r), e.reason, e.where, str(e)) for r, e in refused]

    def each(self, rows: list[Any], processes: int = 1) -> list[RatedExample | RowError]:
        """For each row its example, or the error by which it is rejected."""
        nouns = [_rated(row) for row in rows]
        replies = [reply for noun in nouns if isinstance(noun, Rated) for reply in noun.replies]
        encoded = iter(self.encoder.each(replies, processes))
        done: list[RatedExample | RowError] = []
        for number, (row, noun) in enumerate(zip(rows, nouns, strict=True)):
            one: RatedExample | RowError
            if isinstance(noun, RowError):
                one = noun
            else:
                one = _example(noun, list(islice(encoded, len(noun.replies))), row, number)
            if isinstance(one, RowError):
                one.where = ", ".join(w for w in (_place(row, number), one.where) if w)
            done.append(one)
        return done


def _rated(row: Any) -> Rated | RowError:
    """A row's replies with their rewards."""
    try:
        noun = noun_of(row.value if isinstance(row, Row) else row)
        if isinstance(noun, Preference):
            return noun.rated
        if isinstance(noun, TokenRow) and (reward := _reward(noun)) is not None:
            return Rated((noun,), (reward,))
        if not isinstance(noun, Rated):
            why = "the objective learns from a better and a worse reply, from labels or from rewards"
            fix = "chosen and rejected, a label, or completions with rewards (docs/formats.md)"
            raise RowError("nothing says how good the reply is", reason="unrated_row", why=why, fix=fix)
        return noun
    except RowError as error:
        return error


def _reward(row: TokenRow) -> float | None:
    """The reward of a row of token ids, or the mean advantage of its trained tokens."""
    trained = row.weights > 0
    if row.reward is not None or row.advantages is None or not trained.any():
        return row.reward
    return float(row.advantages[trained].mean())


def _example(
    noun: Rated, encoded: list[Example | RowError], row: Any, number: int
) -> RatedExample | RowError:
    """The row's example, or what the first refused reply is refused for."""
    for name, done in zip(noun.names, encoded, strict=True):
        if isinstance(done, RowError):
            inside = done.where.partition(", ")[2]  # after the reply's number among all that were encoded
            done.where = ", ".join(w for w in (name, inside) if w)
            return done
    replies = tuple(d for d in encoded if isinstance(d, Example))
    if len(replies) > 1 and len({_ids(r) for r in replies}) == 1:
        return RowError(
            "its replies are the same tokens: none is better", reason="same_replies", fix="leave the row out"
        )
    index = row.index if isinstance(row, Row) else number
    return RatedExample(replies, noun.rewards, noun.weight, noun.names, _raw(row), index)


def _ids(reply: Example) -> tuple[bytes, ...]:
    return tuple(s.ids.tobytes() for s in reply)


def _place(row: Any, number: int) -> str:
    return row.where if isinstance(row, Row) else f"row {number}"


def _raw(row: Any) -> Any:
    return row.raw if isinstance(row, Row) else row
