"""The tokens of a request that are counted, each once, and sums over them by word and by segment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..sequence import Segment
from .node_log_probs import NodeValues
from .requests import Request

if TYPE_CHECKING:
    from .scoring import Details

# Where a message has what a segment of this kind says; others are its content.
_FIELDS = {"reasoning": "reasoning_content", "tool_call": "tool_calls"}
_OF_PAIRS = {"prompt": "x", "answer": "y"}


@dataclass(frozen=True)
class Counted:
    """T tokens: y bool [T], whether each is part of y; their values, their texts, and the segment of each."""

    y: npt.NDArray[np.bool_]
    values: NodeValues
    texts: tuple[str, ...]
    segments: tuple[Segment | None, ...]

    def details(self, details: Details, after: float) -> dict[str, Any]:
        """Fields of a Score, as far as they are asked for. after: see `corrected`."""
        found: dict[str, Any] = {}
        if details.tokens:
            found |= {
                "token_log_p": self.values.log_p,
                "token_rank": self.values.rank,
                "token_text": self.texts,
            }
        if details.entropy:
            found["token_entropy"] = self.values.entropy
        if details.top_k:
            found |= {"token_top_ids": self.values.top_ids, "token_top_log_p": self.values.top_log_p}
        if details.words:
            texts, log_p, borders = self.words()
            found |= {"word_text": texts, "word_log_p": log_p}
            if self.values.log_mass is not None:
                found["word_log_p_corrected"] = self.corrected(log_p, borders, after)
        if details.segments:
            found["segments"] = tuple(self.by_segment())
        return found

    def words(self) -> tuple[tuple[str, ...], tuple[float, ...], list[int]]:
        """(texts, Σ log p, borders) of the words of y, by their own borders: white space belongs to the word after it.

        A token that holds parts of several words makes one of them; white space at the end belongs to the last.
        A word with a token that has no probability has NaN. Word i has tokens borders[i] to borders[i + 1] of y.
        """
        texts = self._of_y
        log_p = self.values.log_p[self.y]
        starts = np.cumsum([0, *map(len, texts)])[:-1].tolist()
        first = {match.start() for match in re.finditer(r"\s*\S+", "".join(texts))}
        borders = [i for i, start in enumerate(starts) if i == 0 or (texts[i] and start in first)]
        borders.append(len(texts))
        words = list(pairwise(borders))
        return (
            tuple("".join(texts[a:b]) for a, b in words), tuple(float(log_p[a:b].sum()) for a, b in words), borders,
        )  # fmt: skip

    @property
    def _of_y(self) -> list[str]:
        return [t for t, y in zip(self.texts, self.y, strict=True) if y]

    def corrected(self, log_p: tuple[float, ...], borders: list[int], after: float) -> tuple[float, ...]:
        """log Pr(the word and its end | a word begins), by word; NaN for a last word whose end isn't known.

        Tokens that begin with white space say of a word that it has ended only once the next one is there. With E(c)
        the probability of all tokens at context c after which a word has ended (those that begin with white space,
        and control tokens) it is Σ log p + log E(after the word) − log E(before the word), the latter where the word
        itself begins with white space. Pimentel & Meister 2024 (arXiv 2406.14561), theorem 1; Oh & Schuler 2024
        (arXiv 2406.10851). `after`: log E after the last token of y.
        """
        assert self.values.log_mass is not None
        texts = self._of_y
        ends = [*self.values.log_mass[self.y].tolist(), after]
        return tuple(
            value + ends[b] - (ends[a] if texts[a][:1].isspace() else 0.0)
            for value, (a, b) in zip(log_p, pairwise(borders), strict=True)
        )

    def by_segment(self) -> Iterator[dict[str, Any]]:
        """A record for each run of tokens of one segment: sums leave out tokens without a probability."""
        places = enumerate(self.segments)
        for segment, run in groupby(places, key=lambda place: place[1]):
            some = [i for i, _ in run]
            log_p = self.values.log_p[some]
            yield {
                "kind": segment.kind if segment else "token",
                "message": segment.message if segment else None,
                "field": _field(segment),
                "output": bool(self.y[some[0]]),
                "tokens": len(some),
                "log_p": float(np.nansum(log_p)),
            }


def word_starts(tokenizer: Any) -> tuple[int, ...]:
    """Ids of tokens after which a word has ended: those that begin with white space, and control tokens.

    Raises ConfigError where none begins with white space: a word's end isn't in this vocabulary.
    """
    special = {*tokenizer.all_special_ids}
    ids = [i for i in range(len(tokenizer)) if i not in special]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    texts = tokenizer.batch_decode([[i] for i in ids])
    starts = [
        i for i, piece, text in zip(ids, pieces, texts, strict=True)
        if text[:1].isspace() or (piece or "").startswith("▁")  # sentencepiece's, which decoding strips
    ]  # fmt: skip
    if not starts:
        why = "where a word ends is said by tokens that begin with white space"
        raise ConfigError(
            "no token of this tokenizer begins with white space", why=why, fix="leave out corrected_words"
        )
    return (*starts, *sorted(special))


def counted_tokens(request: Request, values: list[NodeValues], marginal: bool) -> Counted:
    """The counted tokens of a request's parts, of which `values` has those of each sequence."""
    parts = [(p, v.of(np.arange(p.since, len(v.log_p)))) for p, v in zip(request.parts, values, strict=False)]
    y = np.concatenate([p.sequence.output[p.since :] for p, _ in parts])
    joined = _joined([v for _, v in parts])
    if not marginal:  # what is x here may be y of another request, whose values are no part of this one's
        joined = _only(joined, y)
    texts = tuple(t for p, _ in parts for t in p.sequence.tokens[p.since :])
    segments = tuple(s for p, _ in parts for s in _segment_of_each(p.sequence)[p.since :])
    return Counted(y, joined, texts, segments)


def _joined(parts: list[NodeValues]) -> NodeValues:
    columns: list[Any] = [None if v[0] is None else np.concatenate(v) for v in zip(*parts, strict=True)]
    return NodeValues(*columns)


def _only(values: NodeValues, kept: npt.NDArray[np.bool_]) -> NodeValues:
    """The values of some tokens; −1 and NaN for the others."""
    found: list[Any] = [None if v is None else v.copy() for v in values]
    for v in found:
        if v is not None:
            v[~kept] = -1 if v.dtype.kind == "i" else np.nan
    return NodeValues(*found)


def _segment_of_each(sequence: Any) -> list[Segment | None]:
    found: list[Segment | None] = [None] * len(sequence)
    for s in sequence.segments:
        found[s.start : s.stop] = [s] * (s.stop - s.start)
    return found


def _field(segment: Segment | None) -> str | None:
    """Where in the row the text of a segment stands; None for the template's own."""
    if segment is None or segment.kind in ("bos", "template", "end_of_turn"):
        return None
    if segment.message is None:
        return _OF_PAIRS.get(segment.kind)
    return f"messages[{segment.message}].{_FIELDS.get(segment.kind, 'content')}"
