"""The encoder's sequences, found again inside the rows of a batch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..sequence import Example, Sequence
from .evidence import HISTORY, SILENT, UNKNOWN, UNPROVEN, MatchedStretch, ObservedRow, kind_code

SHINGLE = 6  # tokens in a row by which a document is looked up
COMMON = 3  # a shingle of more examples than this (a system prompt) doesn't tell examples from each other
REPLY = ("reasoning", "answer", "tool_call", "end_of_turn")  # kinds that a model writes
FAIR = 0.5  # the share of a document, or of the stretch that a row has of it, that has to agree


class Library:
    """The encoder's sequences, indexed by what occurs in the rows that are to be explained, and by nothing else."""

    def __init__(self, examples: Iterable[Example], seen: Iterable[ObservedRow]) -> None:
        # The batch is small and the data large: of the data only what the batch has is kept.
        indexed = np.unique(np.concatenate([shingles(s.ids) for s in seen]))
        self._examples = _distinct(examples) if len(indexed) else []
        self._places: dict[int, list[_Place]] = {}
        common: set[int] = set()
        # What each of several examples has tells them apart no better than what many have.
        enough = min(len(self._examples), COMMON + 1) if len(self._examples) > 1 else 2
        for e, example in enumerate(self._examples):
            for s, sequence in enumerate(example.sequences):
                hashes = shingles(sequence.ids)
                for offset in np.flatnonzero(_among(hashes, indexed)).tolist():
                    key = int(hashes[offset])
                    if key in common:
                        continue
                    places = self._places.setdefault(key, [])
                    places.append(_Place(e, s, offset))
                    if len({p.example for p in places}) >= enough:
                        common.add(key)
                        del self._places[key]
        self._common = np.fromiter(common, np.uint64, len(common))

    def align(self, seen: ObservedRow) -> None:
        """Fill in codes, output, role, expected and pieces of a seen row."""
        ids = seen.ids
        stretches = self._stretches(seen.ids)
        starts = [max(0, s.at - s.place.offset) for s in stretches]
        for stretch, start, stop in zip(
            stretches, starts, [*starts[1:], len(ids)][: len(starts)], strict=True
        ):
            sequence = self._sequence(stretch.place)
            # A row may have lost tokens of the document, or gained some: what agrees comes in blocks.
            common = blocks(ids[start:stop], sequence.ids)
            # What follows the last token of a document, and is nothing of its example, isn't part of it.
            ends = [start + a + size for a, b, size in common if b + size == len(sequence)]
            seen.codes[start : min(stop, max(ends[0], stretch.known)) if ends else stop] = kind_code(UNKNOWN)
            place = stretch.place
            fill(seen, self._examples[place.example], place.sequence, start, stop, common)

    def _stretches(self, ids: np.ndarray) -> list[_Stretch]:
        """The documents in a row, in order."""
        found: list[_Stretch] = []
        rejected: set[tuple[int, int, int]] = set()
        for i, key in enumerate(shingles(ids).tolist()):
            places = self._places.get(key, [])
            if not places or (found and found[-1].goes_on(i, places)):
                continue
            # Sequences of one example share their beginnings: the one that agrees longest is meant.
            for place in sorted(places, key=lambda p: self._agreement(ids, i, p), reverse=True):
                at = (place.example, place.sequence, i - place.offset)
                if at not in rejected and self._is_fair(ids, i, place):
                    found.append(_Stretch(place, i, place.offset, i + SHINGLE))
                    break
                rejected.add(at)
        return found

    def _sequence(self, place: _Place) -> Sequence:
        return self._examples[place.example].sequences[place.sequence]

    def _agreement(self, ids: np.ndarray, at: int, place: _Place) -> tuple[int, int]:
        there = self._sequence(place).ids
        length = min(len(ids) - at, len(there) - place.offset)
        equal = ids[at : at + length] == there[place.offset : place.offset + length]
        return int(equal.sum()), -len(there)

    def _is_fair(self, ids: np.ndarray, at: int, place: _Place) -> bool:
        """Whether row and document, laid over each other at a shared shingle, agree in a fair share of either.

        One shared phrase doesn't make a stranger this document. What many documents share counts for nothing.
        """
        there = self._sequence(place).ids
        begin = at - place.offset
        here = ids[max(0, begin) : begin + len(there)]
        shared, rest = self._distinctive(here, there)
        _, rest_there = self._distinctive(there, here)
        return shared >= FAIR * min(rest, rest_there)

    def _distinctive(self, ids: np.ndarray, others: np.ndarray) -> tuple[int, int]:
        """(tokens in shingles that `others` has too, tokens in all), without those that are only common."""
        own = shingles(ids)
        common = np.isin(own, self._common)
        shared = _covered(np.isin(own, shingles(others)) & ~common, len(ids))
        only_common = _covered(common, len(ids)) & ~shared
        return int(shared.sum()), len(ids) - int(only_common.sum())


class _Place(NamedTuple):
    example: int
    sequence: int
    offset: int


@dataclass
class _Stretch:
    """A document in a row, found at token `at`. reached: the offset that the row has come to in it. known: the end
    of what its example explains."""

    place: _Place
    at: int
    reached: int
    known: int

    def goes_on(self, i: int, places: list[_Place]) -> bool:
        """Whether the row goes on in this example at token i, and isn't another copy that begins after it."""
        own = [p for p in places if p.example == self.place.example]
        same = [p.offset for p in own if p.sequence == self.place.sequence]
        onward = [offset for offset in same if offset >= self.reached]
        again = same and not onward and i - max(same) >= self.known - SHINGLE
        if not own or again:
            return False
        self.reached = min(onward, default=self.reached)
        self.known = i + SHINGLE
        return True


def _distinct(examples: Iterable[Example]) -> list[Example]:
    """Each example once: repeated rows would make all that they say common."""
    by_content: dict[int, Example] = {}
    for example in examples:
        content = b"".join(s.ids.tobytes() + s.weights.tobytes() for s in example.sequences)
        by_content.setdefault(hash(content), example)
    return list(by_content.values())


def shingles(ids: np.ndarray) -> np.ndarray:
    """uint64 [max(1, T − SHINGLE + 1)]: a hash of each SHINGLE tokens in a row, or of all where there are fewer."""
    # A polynomial hash: Σ id·bᵏ modulo 2⁶⁴, with an odd b, over all windows by one product.
    width = min(SHINGLE, len(ids))
    if not width:
        return np.zeros(0, np.uint64)
    powers = np.full(width, 0x9E3779B97F4A7C15, np.uint64).cumprod()  # wraps around, as meant
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), width)
    return np.asarray(windows @ powers, np.uint64)


def _among(values: np.ndarray, indexed: np.ndarray) -> np.ndarray:
    """bool: which values are in `indexed`, which is sorted, not empty and sorted once for many calls."""
    nearest = indexed[np.searchsorted(indexed, values).clip(max=len(indexed) - 1)]
    return np.asarray(nearest == values, bool)


def _covered(shingles: np.ndarray, size: int) -> np.ndarray:
    """bool [size]: the tokens that lie in one of the marked shingles."""
    covered = np.zeros(size, bool)
    for k in range(min(SHINGLE, size)):
        covered[k : k + len(shingles)] |= shingles
    return covered


def blocks(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int, int]]:
    """(place in a, place in b, length) of what two token lists have in common, in order.

    What they begin and end with alike is taken off first; difflib sees what is between.
    """
    size = min(len(a), len(b))
    equal = a[:size] == b[:size]
    head = size if equal.all() else int(equal.argmin())
    equal = (a[head:] if len(a) <= len(b) else a[len(a) - size + head :])[::-1] == (
        b[head:] if len(b) < len(a) else b[len(b) - size + head :]
    )[::-1]
    tail = len(equal) if equal.all() else int(equal.argmin())
    middle_a, middle_b = a[head : len(a) - tail].tolist(), b[head : len(b) - tail].tolist()
    found = [(0, 0, head)] if head else []
    if middle_a and middle_b:
        matcher = difflib.SequenceMatcher(None, middle_a, middle_b, autojunk=False)
        found += [(head + m.a, head + m.b, m.size) for m in matcher.get_matching_blocks() if m.size > 1]
    return [*found, (len(a) - tail, len(b) - tail, tail)] if tail else found


def fill(
    seen: ObservedRow,
    example: Example,
    number: int,
    start: int,
    stop: int,
    common: list[tuple[int, int, int]],
) -> None:
    """Write what is known of an example's sequence `number` into the stretch [start, stop) of a row.

    common: the `blocks` of the two.
    """
    sequence = example.sequences[number]
    columns = _columns(sequence, example)
    matched = np.zeros(len(sequence), bool)
    for a, b, size in common:
        here, there = slice(start + a, start + a + size), slice(b, b + size)
        for column, values in zip((seen.codes, seen.output, seen.role, seen.expected), columns, strict=True):
            column[here] = values[there]
        matched[there] = True
    if matched.any():
        seen.pieces.append(MatchedStretch(sequence, start, stop, matched))


def _columns(sequence: Sequence, example: Example) -> tuple[np.ndarray, ...]:
    """codes int16, output bool, role int8, expected float [T] by the segments of a sequence and of its siblings."""
    codes, role = np.zeros(len(sequence), np.int16), np.zeros(len(sequence), np.int8)
    output = sequence.weights > 0
    current = {g.message for g in sequence.segments if g.output}
    elsewhere = {g.message for s in example.sequences for g in s.segments if g.output}
    has_question = False
    for g in sequence.segments:
        has_question |= g.kind == "user"
        codes[g.start : g.stop] = kind_code(g.kind)
        output[g.start : g.stop] = g.output
        if g.kind in REPLY and not g.output and g.message not in current:
            # And its end, which is the template's there. A greeting before any question is no reply.
            is_silent = has_question and g.message not in elsewhere
            role[g.start : g.stop + 1] = SILENT if is_silent else HISTORY
    expected = np.where(output, np.nan, 0.0) if UNPROVEN in sequence.notes else sequence.weights
    return codes, output, role, expected
