"""The encoder's sequences of any number of rows, on disk, found again by what they hold."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np

from ..sequence import KINDS, Example, Segment, Sequence
from .alignment import COMMON, shingles

SPARSE = 16  # of a long sequence one shingle in so many is kept, chosen by its hash: in any row the same ones
SHORT = 64  # tokens up to which all are kept
EDGE = 4  # both ends of a sequence are hashed over 16, 32, 64, … tokens
CANDIDATES = 8  # examples that a row is compared with for each of its documents


class Found(NamedTuple):
    """A sequence of an example: the example's number in its store, the example, and the sequence's place in it."""

    number: int
    example: Example
    place: int

    @property
    def sequence(self) -> Sequence:
        return self.example.sequences[self.place]


class SequenceStore:
    """Examples in the order in which they are added; memory holds a few hundred bytes for each.

    A context manager: its file is removed at the end.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ygx-audit-")  # noqa: SIM115 (closed by __exit__)
        self._starts = array("Q", [0])
        self._kinds = list(KINDS)
        self.indices: list[int] = []
        self._whole, self._of_whole = array("Q"), array("I")
        self._shingles, self._of_shingle = array("Q"), array("I")
        self._edges, self._of_edge = array("Q"), array("I")
        self._first: set[int] = set()

    def __enter__(self) -> SequenceStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, example: Example) -> None:
        """Keep an example."""
        number = len(self)
        record = b"".join(self._packed(s) for s in example.sequences)
        self._file.write(record)
        self._starts.append(self._starts[-1] + len(record))
        self.indices.append(number if example.index is None else example.index)
        for s in example.sequences:
            self._whole.append(whole_hash(s.ids))
            self._of_whole.append(number)
            for key in (
                k for n in _lengths(len(s)) for k in (edge_hash(s.ids[:n]), edge_hash(s.ids[-n:], 1))
            ):
                self._edges.append(key)
                self._of_edge.append(number)
            self._first.add(int(shingles(s.ids)[0]))
            kept = _kept(s.ids)
            self._shingles.extend(kept.tolist())
            self._of_shingle.extend([number] * len(kept))

    def freeze(self) -> None:
        """No more examples: sort what they are found by."""
        self._file.flush()
        self._whole_index = _Index(self._whole, self._of_whole)
        self._shingle_index = _Index(self._shingles, self._of_shingle)
        self._edge_index = _Index(self._edges, self._of_edge)
        self._first_shingles = np.array(sorted(self._first), np.uint64)

    def example(self, number: int) -> Example:
        """An example as it was added, without its row."""
        start, stop = self._starts[number], self._starts[number + 1]
        data = os.pread(self._file.fileno(), stop - start, start)
        sequences, at = [], 0
        while at < len(data):
            sequence, at = self._unpacked(data, at)
            sequences.append(sequence)
        return Example(tuple(sequences), index=self.indices[number])

    def equal(self, ids: np.ndarray) -> list[Found]:
        """All sequences that are these ids."""
        numbers = self._whole_index.of(np.array([whole_hash(ids)], np.uint64))
        found = [f for n in sorted(set(numbers.tolist()))[:CANDIDATES] for f in self.sequences(n)]
        return [f for f in found if np.array_equal(f.sequence.ids, ids)]

    def sequences(self, number: int) -> list[Found]:
        """The sequences of an example."""
        example = self.example(number)
        return [Found(number, example, k) for k in range(len(example.sequences))]

    def with_its_edge(self, ids: np.ndarray) -> list[int]:
        """Examples that begin or end as these ids do, over at least half of them."""
        lengths = _lengths(len(ids))
        if not lengths:
            return []
        n = lengths[-1]
        keys = np.array([edge_hash(ids[:n]), edge_hash(ids[-n:], 1)], np.uint64)
        return sorted(set(self._edge_index.of(keys).tolist()))

    def beginnings(self, ids: np.ndarray) -> list[int]:
        """Where in a list of tokens a sequence may begin."""
        return [int(i) for i in np.flatnonzero(np.isin(shingles(ids), self._first_shingles))]

    def similar(self, ids: np.ndarray) -> list[int]:
        """Examples that may be in a row, by the shingles that few of them have."""
        numbers = self._shingle_index.of(shingles(ids), rare=COMMON)
        if not len(numbers):
            numbers = self._shingle_index.of(shingles(ids))
            return [n for n, _ in Counter(numbers.tolist()).most_common(CANDIDATES)]
        most = CANDIDATES * (1 + len(ids) // SHORT)
        return [n for n, _ in Counter(numbers.tolist()).most_common(most)]

    def _packed(self, s: Sequence) -> bytes:
        notes = json.dumps(s.notes).encode() if s.notes else b""
        segments = [
            (g.start, g.stop, self._kind(g.kind), g.output, -1 if g.message is None else g.message)
            for g in s.segments
        ]
        head = np.array([len(s), len(segments), len(notes)], np.int32)
        columns = (head, s.ids.astype(np.int32), s.weights, np.array(segments, np.int32))
        return b"".join(c.tobytes() for c in columns) + notes

    def _kind(self, kind: str) -> int:
        if kind not in self._kinds:
            self._kinds.append(kind)
        return self._kinds.index(kind)

    def _unpacked(self, data: bytes, at: int) -> tuple[Sequence, int]:
        tokens, count, size = np.frombuffer(data, np.int32, 3, at).tolist()
        at += 12
        ids = np.frombuffer(data, np.int32, tokens, at).astype(np.int64)
        weights = np.frombuffer(data, np.float32, tokens, at + 4 * tokens)
        at += 8 * tokens
        rows = np.frombuffer(data, np.int32, 5 * count, at).reshape(-1, 5).tolist()
        at += 20 * count
        segments = tuple(
            Segment(start, stop, self._kinds[kind], bool(output), None if message < 0 else message)
            for start, stop, kind, output, message in rows
        )
        notes = tuple(json.loads(data[at : at + size])) if size else ()
        return Sequence(ids, weights, segments, notes=notes), at + size


class _Index:
    """Sorted hashes, each with the number of its example."""

    def __init__(self, keys: array[int], numbers: array[int]) -> None:
        hashes = np.frombuffer(keys, np.uint64) if keys else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._keys = hashes[order]
        self._numbers = (np.frombuffer(numbers, np.uint32) if numbers else np.zeros(0, np.uint32))[order]

    def of(self, keys: np.ndarray, rare: int | None = None) -> np.ndarray:
        """The examples of these keys, with repetitions; `rare`: only of keys that so many have at most."""
        first = np.searchsorted(self._keys, keys, "left")
        last = np.searchsorted(self._keys, keys, "right")
        count = last - first
        kept = (count > 0) & (count <= (CANDIDATES if rare is None else rare))
        parts = [self._numbers[a:b] for a, b in zip(first[kept], last[kept], strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def whole_hash(ids: np.ndarray) -> int:
    """A hash of all ids, the same within one process."""
    return hash(ids.astype(np.int32).tobytes()) & 0xFFFFFFFFFFFFFFFF


def edge_hash(ids: np.ndarray, end: int = 0) -> int:
    """A hash of the first tokens of a sequence, or of its last ones."""
    return hash((end, ids.astype(np.int32).tobytes())) & 0xFFFFFFFFFFFFFFFF


def _lengths(tokens: int) -> list[int]:
    """The lengths, powers of two, at which both ends of a sequence are hashed."""
    return [1 << k for k in range(EDGE, tokens.bit_length()) if 1 << k <= tokens]


def _kept(ids: np.ndarray) -> np.ndarray:
    """The shingles that a sequence is found by."""
    every = shingles(ids)
    # Chosen before they are made distinct, which takes longer than all else here.
    return np.unique(every if len(ids) <= SHORT else every[(every >> 40) % SPARSE == 0])
