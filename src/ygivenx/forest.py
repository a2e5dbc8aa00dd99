"""The forest: every distinct prefix of a batch once, with weights on its edges.

Equals `ygivenx.reference.forest`: the same prefixes, and weights that are added in float64 and kept in float32.
A token is a node whose path from the root is its context, so log p(v) = log Pr(token v | path to its parent).
Nodes stand in depth-first preorder, and `end[k]`, one past the subtree of k, is the whole attention mask:
q attends to k iff k <= q < end[k].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import RowError
from .packing import KEYS, Read, plan, prefix_order
from .sequence import Example, RatedExample, Sequence
from .show import plural

MAX_TOKENS = 4096  # distinct tokens of a pack, unless another number is given
LARGEST = 2**31  # ids are compared as 32-bit numbers

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
        # Two look-ups in one array: which rows are meant, and where each of them stands among those that were given.
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
            f"Forest: {plural(len(self.paths), 'sequence')}, {n:,} distinct of {self.total:,} tokens "
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
    flat = list(_flatten(sequences))
    packs = plan(*_comparable(flat), max_tokens, seed, epoch)
    return [grown(flat.__getitem__, members) for members in packs]


def grown(sequence: Callable[[int], Sequence], members: list[int]) -> Forest:
    """The forest of some sequences, each given by its number."""
    return replace(_grow([sequence(i) for i in members]), members=tuple(members))


def _flatten(items: Iterable[Any]) -> Iterator[Sequence]:
    for item in items:
        if isinstance(item, Example | RatedExample):
            yield from item.sequences
        elif isinstance(item, Sequence):
            yield item
        else:
            yield Sequence(*item)


def _comparable(sequences: list[Sequence]) -> tuple[Ints, Read]:
    """(lengths, a reader of tokens) for `prefix_order`. Raises RowError for an empty sequence or a bad id."""
    for i, s in enumerate(sequences):
        if not len(s):
            raise RowError("it has no tokens", reason="empty", where=f"sequence {i}", fix="leave it out")
        for id_ in (int(s.ids.min()), int(s.ids.max())):
            if not 0 <= id_ < LARGEST:
                what = f"token id {id_} is negative" if id_ < 0 else f"token id {id_} is too large"
                raise RowError(what, reason="bad_id", where=f"sequence {i}")

    def read(which: Ints, start: int, stop: int) -> Any:
        block = np.zeros((len(which), stop - start), KEYS)
        for row, i in zip(block, which.tolist(), strict=True):
            ids = sequences[i].ids[start:stop]
            row[: len(ids)] = ids + 1
        return block

    return np.array([len(s) for s in sequences], np.int64), read


def _deepest_first(length: Ints, order: Ints, shared: Ints) -> tuple[list[int], Ints]:
    """Sorted sequences so that of branches which part at one place the one with the longest sequence comes first.

    The longest path from any node then stands side by side, and so does most of what leads to other branches:
    attention reads it without a copy.
    """
    length = length[order]
    # Depth first, without recursion: a chain of shared prefixes may be as long as a sequence.
    places, common = list[int](), list[int]()
    todo = [(0, len(order), 0)] if len(order) else []
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
    return order[places].tolist(), np.array(common, np.int64)


def _grow(sequences: list[Sequence]) -> Forest:
    length, read = _comparable(sequences)
    # The sequences a b c, a b d e and a f become, the deepest branch first,
    #     node    0  1  2  3  4  5
    #     token   a  b  d  e  c  f
    #     parent -1  0  1  2  1  0
    #     depth   0  1  2  3  2  1
    #     end     6  5  4  4  5  6
    # so that e sees the k <= 3 with end[k] > 3, which are a, b, d and itself.
    order, shared = _deepest_first(length, *prefix_order(length, read))
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
