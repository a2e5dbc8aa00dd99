"""The forest: every distinct prefix of a batch once, with weights on its edges.

A token is a node whose path from the root is its context, so log p(v) = log Pr(token v | path to its parent).
Nodes stand in depth-first preorder, and `end[k]`, one past the subtree of k, is the whole attention mask:
q attends to k iff k <= q < end[k].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, RowError
from .sequence import Example, Sequence

MAX_TOKENS = 4096  # distinct tokens of a pack, unless another number is given

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Edges(NamedTuple):
    """What the head is asked for, sorted by row: row rows[e] has to predict targets[e], with weights[e].

    rows int64 [E] index into the rows that the model computes (`Forest.fed`); targets int64 [E] token ids;
    weights float32 [E]; nodes int64 [E], the node that each edge leads to.
    """

    rows: Ints
    targets: Ints
    weights: Floats
    nodes: Ints

    def leaving(self, rows: Ints) -> tuple[Ints, Ints]:
        """(the edges out of `rows`, where among `rows` each comes from), int64 [n], sorted by the latter."""
        place = np.full(max((int(r.max()) + 1 for r in (rows, self.rows) if len(r)), default=0), -1)
        place[rows] = np.arange(len(rows))
        local = place[self.rows]
        these = np.flatnonzero(local >= 0)
        these = these[np.argsort(local[these], kind="stable")]
        return these, local[these]


@dataclass(frozen=True, eq=False)
class Forest:
    """N nodes in depth-first preorder, and the paths of the sequences that they came from.

    token, parent (-1 for a root), depth (the position id), end (one past the subtree): int64 [N].
    weight: float32 [N], of the edge into the node; where sequences meet, their weights add up.
    paths: the nodes of each sequence, int64 [T_i], in input order; members: each one's index in what was
    given to `pack` (or to `Forest.of`).
    """

    token: Ints
    parent: Ints
    depth: Ints
    end: Ints
    weight: Floats
    paths: tuple[Ints, ...]
    members: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Iterable[Any]) -> Forest:
        """Merge Sequences, Examples or (ids, weights) pairs by equal ids from the root; nothing else merges.

        Raises RowError for a sequence without tokens or with a negative id.
        """
        return _grow(list(_flatten(sequences)))

    @cached_property
    def fed(self) -> Ints:
        """The nodes with children, int64 [F], in preorder: only they need a forward pass."""
        return np.flatnonzero(self.end > np.arange(len(self.end)) + 1)

    @cached_property
    def fed_end(self) -> Ints:
        """`end` of the fed nodes, counted in fed nodes, int64 [F]: the forest that the model sees."""
        return np.searchsorted(self.fed, self.end[self.fed])

    def edges(self, scored: bool | npt.NDArray[np.bool_] | None = None) -> Edges:
        """The edges with a weight; `scored=True` all that have a context; or those of a bool mask [N]."""
        chosen = self.weight != 0 if scored is None else np.broadcast_to(scored, self.token.shape)
        nodes = np.flatnonzero(chosen & (self.parent >= 0))
        nodes = nodes[np.argsort(self.parent[nodes], kind="stable")]
        rows = np.searchsorted(self.fed, self.parent[nodes])
        return Edges(rows, self.token[nodes], self.weight[nodes], nodes)

    @property
    def total(self) -> int:
        """Tokens of all sequences, each counted as often as it occurs."""
        return sum(map(len, self.paths))

    def __len__(self) -> int:
        return len(self.token)

    def __str__(self) -> str:
        n, trained = len(self), int((self.weight != 0).sum())
        return (
            f"Forest: {len(self.paths):,} sequences, {n:,} distinct of {self.total:,} tokens "
            f"({self.total / max(n, 1):.2f}× shared), {trained:,} trained ({trained / max(n, 1):.1%})"
        )

    __repr__ = __str__


def pack(
    sequences: Iterable[Any], max_tokens: int = MAX_TOKENS, seed: int = 0, epoch: int = 0
) -> list[Forest]:
    """Forests of at most `max_tokens` distinct tokens each, all sequences in exactly one.

    Subtrees worth sharing stay together. A subtree that can't be cut without computing much of it twice,
    such as one long sequence, is a pack of its own, however long. Which sequences share a pack, and the order of packs,
    are a function of (seed, epoch). Raises ConfigError for max_tokens < 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}", fix="give at least 1; 4096 to 16384 is usual")
    flat = list(_flatten(sequences))
    order, shared = _sorted(flat)
    units = _units(np.array([len(flat[i]) for i in order], np.int64), shared, max_tokens)
    shuffled = np.random.default_rng((seed, epoch)).permutation(len(units))
    packs: list[list[int]] = []
    room, there = 0, set[Stem]()
    for unit in (units[i] for i in shuffled):
        if unit.cost(there) > room:
            packs.append([])
            room, there = max_tokens, set()
        packs[-1].extend(order[unit.start : unit.stop])
        room -= unit.cost(there)
        there.update(unit.stems)
    return [_pack_of(flat, members) for members in packs]


def _pack_of(flat: list[Sequence], members: list[int]) -> Forest:
    members = sorted(members)
    return replace(_grow([flat[i] for i in members]), members=tuple(members))


def _flatten(items: Iterable[Any]) -> Iterator[Sequence]:
    for item in items:
        if isinstance(item, Example):
            yield from item.sequences
        elif isinstance(item, Sequence):
            yield item
        else:
            yield Sequence(*item)


def _sorted(sequences: list[Sequence]) -> tuple[list[int], Ints]:
    """(lexicographic order, tokens that each shares with the one before it in that order, int64 [n])."""
    for i, s in enumerate(sequences):
        if not len(s):
            raise RowError("it has no tokens", reason="empty", where=f"sequence {i}", fix="leave it out")
        if s.ids.min() < 0:
            raise RowError(f"token id {s.ids.min()} is negative", reason="bad_id", where=f"sequence {i}")
    # Big-endian bytes compare like the ids themselves.
    keys = [s.ids.astype(">i8").tobytes() for s in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return order, _common_prefixes([sequences[i].ids for i in order])


def _common_prefixes(rows: list[Ints]) -> Ints:
    if not rows:
        return np.zeros(0, np.int64)
    flat = np.concatenate(rows)
    length = np.array([len(r) for r in rows])
    start = np.cumsum(length) - length
    position = np.arange(len(flat)) - np.repeat(start, length)
    before = np.repeat(np.concatenate(([0], start[:-1])), length) + position
    differs = flat[np.minimum(before, len(flat) - 1)] != flat
    differs |= position >= np.repeat(np.concatenate(([0], length[:-1])), length)
    return np.minimum.reduceat(np.where(differs, position, np.repeat(length, length)), start)


def _deepest_first(sequences: list[Sequence], order: list[int], shared: Ints) -> tuple[list[int], Ints]:
    """Sorted sequences so that of branches which part at one place the one with the longest sequence comes first.

    The longest path from any node then stands side by side, and so does most of what leads to other branches:
    attention reads it without a copy.
    """
    length = np.array([len(sequences[i]) for i in order], np.int64)
    places, common = list[int](), list[int]()
    todo = [(0, len(order), 0)] if order else []
    while todo:
        start, stop, before = todo.pop()
        if stop - start == 1:
            places.append(start)
            common.append(before)
            continue
        inner = shared[start + 1 : stop]
        branch = int(inner.min())
        cuts = (start + 1 + np.flatnonzero(inner == branch)).tolist()
        parts = sorted(pairwise([start, *cuts, stop]), key=lambda part: -int(length[slice(*part)].max()))
        # The last one in is taken out first.
        todo += [(*part, branch) for part in reversed(parts[1:])] + [(*parts[0], before)]
    return [order[p] for p in places], np.array(common, np.int64)


def _grow(sequences: list[Sequence]) -> Forest:
    order, shared = _deepest_first(sequences, *_sorted(sequences))
    fresh = [s.ids[k:] for s, k in zip((sequences[i] for i in order), shared, strict=True)]
    count = sum(map(len, fresh))
    parent, depth = np.arange(-1, count - 1), np.empty(count, np.int64)
    end, weight = np.full(count, count), np.zeros(count)
    paths: list[Ints] = [np.zeros(0, np.int64)] * len(sequences)
    path, n = np.zeros(0, np.int64), 0
    for i, k in zip(order, shared.tolist(), strict=True):
        stop = n + len(sequences[i]) - k
        end[path[k:]] = n  # in this order nothing comes back to what this sequence leaves
        if stop > n:
            parent[n] = path[k - 1] if k else -1
            depth[n:stop] = np.arange(k, k + stop - n)
        path = np.concatenate((path[:k], np.arange(n, stop)))
        weight[path] += sequences[i].weights
        paths[i], n = path, stop
    token = np.concatenate(fresh) if fresh else np.zeros(0, np.int64)
    return Forest(
        token, parent, depth, end, weight.astype(np.float32), tuple(paths), tuple(range(len(paths)))
    )


Stem = tuple[int, int]  # (a place among the sorted sequences that names it, tokens)


@dataclass(frozen=True)
class _Unit:
    """Sorted sequences [start, stop) that stay together: `own` distinct tokens, on stems that others may share."""

    start: int
    stop: int
    own: int
    stems: tuple[Stem, ...]

    def cost(self, there: set[Stem]) -> int:
        """Tokens that it adds to a pack in which some stems are there already."""
        return self.own + sum(stem[1] for stem in self.stems if stem not in there)


def _units(length: Ints, shared: Ints, max_tokens: int) -> list[_Unit]:
    """Subtrees that stay together.

    A subtree is taken apart at its first branching if sharing its stem would spare less than 1/32 of what leaves
    the largest branch. One that doesn't fit is taken apart, too, where the stem once per pack is less than that.
    """
    fresh = np.concatenate(([0], np.cumsum(length - shared)))

    def size(start: int, stop: int) -> int:
        return int(fresh[stop] - fresh[start] + shared[start])

    units = []
    todo: list[tuple[int, int, int, tuple[Stem, ...]]] = [(0, len(length), 0, ())] if len(length) else []
    while todo:
        start, stop, depth, stems = todo.pop()
        whole = size(start, stop) - depth
        if stop - start > 1:
            branch = int(shared[start + 1 : stop].min())
            cuts = start + 1 + np.flatnonzero(shared[start + 1 : stop] == branch)
            parts = list(pairwise([start, *cuts.tolist(), stop]))
            leaving = whole - max(size(*part) - depth for part in parts)
            # Taken apart, each further branch computes the stem again. A subtree that fits into a pack is only taken
            # apart where that costs less than 1/32 of what leaves it: some 3 % of its tokens for freedom in packing.
            # One that doesn't fit needs the stem once per pack anyway.
            again = len(cuts) * 32 if whole + depth <= max_tokens else min(len(cuts), whole // max_tokens)
            if (branch - depth) * again < max(leaving, 1):
                inner = (*stems, (int(cuts[0]), branch - depth)) if branch > depth else stems
                todo += [(*part, branch, inner) for part in parts]
                continue
        units.append(_Unit(start, stop, whole, stems))
    return units
