"""Rows that repeat another row, or answer another row's prompt otherwise: by hashes, whatever their number."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np

from ..encoded import EncodedRows

SHOWN = 24  # tokens of an answer that are kept for a finding


class Repeats:
    """What rows ask and answer. Memory holds some 130 bytes for each. what: the word for such a row."""

    def __init__(self, what: str = "rows") -> None:
        self.what = what
        self._numbers, self._hashes, self._answers = array("q"), array("Q"), array("i")

    @classmethod
    def of(cls, encoded: EncodedRows) -> Repeats:
        """Of encoded rows: by the ids of all sequences of a row, and by x and the first y of its first one."""
        repeats, bare = cls(), encoded.bare_ones()
        firsts = [*encoded.firsts.tolist(), len(encoded)]
        for first, stop in pairwise(firsts):
            s, *others = islice(bare, stop - first)
            ids = np.concatenate([s.ids, *(o.ids for o in others)])
            repeats.add(int(encoded.row[first]), ids, np.asarray(s.weights > 0))
        return repeats

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, ids: np.ndarray, output: np.ndarray) -> None:
        """ids int64 [T]; output bool, of the first of them: what the model has to write; without any, x is all."""
        start = int(np.append(output, True).argmax())
        stop = start + int(np.append(output[start:], False).argmin())
        y = ids[start:stop]
        parts = (ids.tobytes(), ids[:start].tobytes() + b"?" * (stop > start), y.tobytes())
        self._numbers.append(number)
        self._hashes.extend(hash(part) & 0xFFFFFFFFFFFFFFFF for part in parts)
        self._answers.extend([*y[:SHOWN].tolist(), *[-1] * (SHOWN - len(y))][:SHOWN])

    def duplicates(self) -> list[list[int]]:
        """The numbers of rows that are one another, in groups."""
        return [[self._numbers[i] for i in group] for group in _groups(self._column(0))]

    def conflicts(self) -> list[tuple[int, dict[int, np.ndarray]]]:
        """For each x with several y: how many rows; of each y the first row's number and its first tokens."""
        answers, torn = self._column(2), []
        for group in _groups(self._column(1)):
            _, first = np.unique(answers[group], return_index=True)
            if len(first) > 1:
                places = group[np.sort(first)].tolist()
                torn.append((len(group), {self._numbers[i]: self._answer(i) for i in places}))
        return torn

    def _column(self, k: int) -> np.ndarray:
        return np.array(self._hashes, np.uint64).reshape(-1, 3)[:, k]

    def _answer(self, i: int) -> np.ndarray:
        return np.array(self._answers[i * SHOWN : (i + 1) * SHOWN])


def _groups(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The places of each key that several have, by their first place."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]], append=~keys[order[-1:]]))
    groups = [order[a:b] for a, b in pairwise(edges) if b - a > 1]
    yield from sorted(groups, key=lambda g: int(g[0]))
