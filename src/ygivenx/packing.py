"""Which sequences share a pack: by what they have in common, from their lengths and a few tokens at a time.

Nothing here holds all tokens: sequences may lie in a file that is larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .errors import ConfigError

Ints = npt.NDArray[np.int64]
# read(which int64 [n], start, stop): big-endian uint32 [n, stop − start], ids + 1; 0 beyond a sequence's end.
Read = Callable[[Ints, int, int], npt.NDArray[np.uint32]]
Stem = tuple[int, int]  # (a place among the sorted sequences that names it, tokens)

KEYS = ">u4"  # big-endian bytes compare like the numbers themselves
BLOCK = 1 << 23  # tokens that are compared at a time


@dataclass(frozen=True)
class PackPlan:
    """Packs: pack i has the sequences members[bounds[i]:bounds[i+1]], and distinct[i] distinct tokens; all int64."""

    members: Ints
    bounds: Ints
    distinct: Ints

    def __len__(self) -> int:
        return len(self.distinct)

    def __getitem__(self, i: int) -> list[int]:
        """The sequences of pack i in ascending order."""
        if i >= len(self):
            raise IndexError(i)
        return sorted(self.members[self.bounds[i] : self.bounds[i + 1]].tolist())

    def __iter__(self) -> Iterator[list[int]]:
        return (self[i] for i in range(len(self)))

    def sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """float64 [packs]: the sum over the sequences of each pack, of values float64 [n] by sequence."""
        return np.add.reduceat(values[self.members], self.bounds[:-1]) if len(self) else np.zeros(0)

    def only(self, packs: Ints) -> PackPlan:
        """Some of the packs."""
        chosen = [self.members[self.bounds[i] : self.bounds[i + 1]] for i in packs.tolist()]
        return PackPlan(_joined(chosen), _bounds([len(c) for c in chosen]), self.distinct[packs])


def joined(plans: list[PackPlan]) -> PackPlan:
    """The packs of several plans, one after another."""
    sizes = [size for p in plans for size in np.diff(p.bounds).tolist()]
    return PackPlan(_joined([p.members for p in plans]), _bounds(sizes), _joined([p.distinct for p in plans]))


def plan(lengths: Ints, read: Read, max_tokens: int, seed: int = 0, epoch: int = 0) -> PackPlan:
    """Packs of at most `max_tokens` distinct tokens, each sequence in exactly one.

    lengths: int64 [n], of the sequences. Subtrees worth sharing stay together. A subtree that can't be cut without
    computing much of it twice, such as one long sequence, is a pack of its own, however long. Which sequences share a
    pack, and the order of packs, are a function of (seed, epoch). Raises ConfigError for max_tokens < 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}", fix="give at least 1; 4096 to 16384 is usual")
    order, shared = prefix_order(lengths, read)
    units = _units(lengths[order], shared, max_tokens)
    shuffled = np.random.default_rng((seed, epoch)).permutation(len(units.start))
    firsts, distinct = _filled(units, shuffled, max_tokens)
    starts, sizes = units.start[shuffled], (units.stop - units.start)[shuffled]
    ends = np.cumsum(sizes)
    places = np.repeat(starts - (ends - sizes), sizes) + np.arange(len(order))
    bounds = np.append((ends - sizes)[firsts], len(order))
    return PackPlan(order[places], bounds.astype(np.int64), distinct)


def _filled(units: _Units, shuffled: Ints, max_tokens: int) -> tuple[Ints, Ints]:
    """(the place of each pack's first unit among the shuffled ones, distinct tokens of each pack)."""
    firsts, distinct = list[int](), list[int]()
    room, there = 0, set[Stem]()
    for n, u in enumerate(shuffled.tolist()):
        own, stems = int(units.own[u]), units.stems[units.stem[u]]
        # A stem that an earlier unit of this pack has brought along is computed already.
        cost = own + sum(tokens for place, tokens in stems if (place, tokens) not in there)
        if cost > room:
            firsts.append(n)
            distinct.append(0)
            room, there, cost = max_tokens, set(), own + sum(tokens for _, tokens in stems)
        room -= cost
        distinct[-1] += cost
        there.update(stems)
    return np.array(firsts, np.int64), np.array(distinct, np.int64)


def prefix_order(lengths: Ints, read: Read) -> tuple[Ints, Ints]:
    """(lexicographic order, tokens that each shares with the one before it in that order), both int64 [n].

    Sequences are compared a block of tokens at a time; those that differ from their neighbours are done.
    """
    order, shared = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    places, group, at = order.copy(), order * 0, 0  # the places that are still open; equal so far: one group
    while len(places):
        width = max(1, min(max(BLOCK // len(places), 8), int(lengths[order[places]].max()) - at))
        # One sort for all groups: the group's number stands before its tokens, so that equal beginnings of other
        # groups don't mix. Big-endian bytes sort as numbers do.
        keys = np.empty((len(places), width + 1), KEYS)
        keys[:, 0], keys[:, 1:] = group, read(order[places], at, at + width)
        arranged = np.argsort(keys.view(f"S{keys.strides[0]}")[:, 0], kind="stable")
        order[places], keys = order[places][arranged], keys[arranged]
        differs = keys[1:] != keys[:-1]
        first, equal = differs.argmax(1), ~differs.any(1)
        parted = ~equal & (first > 0)  # column 0 is the group
        shared[places[1:][parted]] = at + first[parted] - 1
        ended = equal & (keys[1:, -1] == 0)
        # Both have ended: one is the other once more.
        shared[places[1:][ended]] = lengths[order[places[1:][ended]]]
        goes_on = equal & ~ended
        # Two neighbours that are equal so far keep each other open.
        is_open = np.append(goes_on, False) | np.insert(goes_on, 0, False)
        group = np.cumsum(~np.insert(goes_on, 0, False))[is_open]
        places, at = places[is_open], at + width
    return order, shared


@dataclass(frozen=True)
class _Units:
    """Sorted sequences [start, stop) that stay together: `own` distinct tokens, on stems that others may share.

    start, stop, own: int64 [units]; stem: int64 [units], an index into `stems`.
    """

    start: Ints
    stop: Ints
    own: Ints
    stem: Ints
    stems: list[tuple[Stem, ...]]


@dataclass
class _Parts:
    """Units as they are found."""

    columns: list[Ints] = field(default_factory=list)
    stems: list[tuple[Stem, ...]] = field(default_factory=lambda: [()])

    def add(self, start: Ints, stop: Ints, own: Ints, stem: int) -> None:
        self.columns.append(np.stack([start, stop, own, np.full(len(start), stem)]))

    def units(self) -> _Units:
        """In the order of their sequences."""
        columns = np.concatenate(self.columns, axis=1) if self.columns else np.zeros((4, 0), np.int64)
        start, stop, own, stem = columns[:, np.argsort(columns[0])]
        return _Units(start, stop, own, stem, self.stems)


def _units(length: Ints, shared: Ints, max_tokens: int) -> _Units:
    """Subtrees that stay together.

    A subtree is taken apart at its first branching if sharing its stem would spare less than 1/32 of what leaves
    the largest branch. One that doesn't fit is taken apart, too, where the stem once per pack is less than that.
    """
    fresh = _bounds(length - shared)
    found = _Parts()
    todo = [(0, len(length), 0, 0)] if len(length) else []
    while todo:
        start, stop, depth, stem = todo.pop()
        whole = int(fresh[stop] - fresh[start] + shared[start]) - depth
        if stop - start > 1:
            branch = int(shared[start + 1 : stop].min())
            cuts = start + 1 + np.flatnonzero(shared[start + 1 : stop] == branch)
            starts, stops = np.insert(cuts, 0, start), np.append(cuts, stop)
            own = fresh[stops] - fresh[starts] + shared[starts] - branch
            leaving = whole - int(own.max()) - (branch - depth)
            # Taken apart, each further branch computes the stem again. A subtree that fits into a pack is only taken
            # apart where that costs less than 1/32 of what leaves it: some 3 % of its tokens for freedom in packing.
            # One that doesn't fit needs the stem once per pack anyway.
            again = len(cuts) * 32 if whole + depth <= max_tokens else min(len(cuts), whole // max_tokens)
            if (branch - depth) * again < max(leaving, 1):
                if branch > depth:
                    found.stems.append((*found.stems[stem], (int(cuts[0]), branch - depth)))
                    stem = len(found.stems) - 1
                # A single sequence is a unit; what holds several may be taken apart further.
                lone = stops - starts == 1
                found.add(starts[lone], stops[lone], own[lone], stem)
                many = zip(starts[~lone].tolist(), stops[~lone].tolist(), strict=True)
                todo += [(*part, branch, stem) for part in many]
                continue
        found.add(np.array([start]), np.array([stop]), np.array([whole]), stem)
    return found.units()


def _bounds(sizes: Ints | list[int]) -> Ints:
    """int64 [n + 1]: where each of consecutive parts begins, and the end."""
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
