"""Rows of token ids to sequences: ids as they are given, weights by policy, nothing encoded."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Texts
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..errors import RowError
from ..rows.nouns import TokenRow
from ..sequence import Sequence
from .assemble import Job, Options, fitted, sequence_of
from .policy import Part, weight_of


def token_job(row: TokenRow, options: Options) -> Job:
    """No text to encode, and the sequence. Raises RowError for an id that the tokenizer doesn't have."""
    _check_ids(row, len(options.tokens.tokenizer))
    return Job([], lambda parts: fitted([_sequence(row, options)], options.max_length, options.overflow))


def _check_ids(row: TokenRow, size: int) -> None:
    if len(unknown := np.flatnonzero(row.ids >= size)):
        what = f"the id {row.ids[unknown[0]]} isn't in this tokenizer's vocabulary of {size}"
        why = "the row was written with another tokenizer: the same ids would be other texts"
        raise RowError(what, reason="bad_token", field=f"token {unknown[0]}", why=why)


def _sequence(row: TokenRow, options: Options) -> Sequence:
    """Of y the policy's factor times the row's own weights; of the prompt the policy alone, as rows have no say in it.

    A token of weight 0 after the prompt is context by the row's own word, whatever the policy.
    """
    weights, segments = row.weights.copy(), row.segments()
    for s in segments:
        if s.output:
            weights[s.start : s.stop] *= weight_of(options.policy, Part(s.kind, True, last=True))
    weights[: row.prompt_length] = weight_of(options.policy, Part("prompt", False))
    return sequence_of(
        row.ids, weights, segments, DecodedTokens(options.tokens.tokenizer, row.ids), row.notes
    )


_LONGEST = 8  # tokens of one character, or of two that are written together


class DecodedTokens(Texts[str]):
    """The text of each token, for people: decoded when it is asked for, and never encoded.

    Of a character that is several tokens, the first has it and the others are empty. A token that the whole text
    doesn't show by itself has its name in the vocabulary.
    """

    __slots__ = ("_ids", "_texts", "_tokenizer")

    def __init__(self, tokenizer: Any, ids: npt.NDArray[np.int64]) -> None:
        self._tokenizer, self._ids = tokenizer, ids
        self._texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[str, ...]: ...
    def __getitem__(self, i: int | slice) -> str | tuple[str, ...]:
        return self._all()[i]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Texts) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:  # a tokenizer for each row is much to send
        return tuple, (self._all(),)

    def _all(self) -> tuple[str, ...]:
        if self._texts is None:
            self._texts = tuple(self._cut())
        return self._texts

    def _cut(self) -> Iterator[str]:
        """The whole text cut where the texts of single tokens, or of a few together, stand in it."""
        ids, at, i = self._ids.tolist(), 0, 0
        whole = self._decode(ids)
        while i < len(ids):
            for count in range(1, min(_LONGEST, len(ids) - i) + 1):
                text = self._decode(ids[i : i + count])
                if "\ufffd" not in text and whole.startswith(found := text, at):
                    break
                if whole.startswith(found := f" {text}", at):  # decoders drop a space at the beginning
                    break
            else:
                count, found = 1, ""
            name = self._tokenizer.convert_ids_to_tokens(ids[i]) or ""
            yield found or name
            yield from [""] * (count - 1)
            at, i = at + len(found), i + count

    def _decode(self, ids: list[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))
