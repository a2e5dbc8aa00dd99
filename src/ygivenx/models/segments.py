"""The segments of a forest: runs without branches, which recurrent layers compute from their parent's state.

Segments of one level, those with equally many segments above them, don't need each other: a layer is called once
or a few times per level, and not once per segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..forest import Ints
from .plan import NO_NODES, Plan

ROOM = 64  # padding up to which a further call would cost more; the chunk of the delta rule


class Segments(NamedTuple):
    """Segments in preorder: s holds the nodes start[s] to start[s] + length[s].

    start, length, level: int64 [S]. above: int64 [S], the node that the first one hangs on, -1 for a root. parent:
    int64 [S], that node's segment; -1 where there is none. inner: bool [S], whether the state in which it ends is asked
    for.

    >>> segments(np.array([6, 6, 4, 4, 6, 6])).start  # two nodes, then a branch of two and another of two
    array([0, 2, 4])
    """

    start: Ints
    length: Ints
    above: Ints
    parent: Ints
    level: Ints
    inner: npt.NDArray[np.bool_]


def segments(end: Ints, first: int = 0, kept: Ints = NO_NODES) -> Segments:
    """The segments of a forest given by `end`, int64 [N], one past the subtree of each node.

    first: the nodes before it are a path that was computed before, and in no segment. kept: int64, nodes whose state is
    asked for: segments end there, too.
    """
    branchings = _branchings(end)
    # A branching cuts twice: where the new branch begins, and behind the node that it hangs on.
    cuts = [first, *branchings, *(node + 1 for node in branchings.values()), *(kept + 1).tolist()]
    start = np.unique(np.array(cuts, np.int64))
    start = start[(start >= first) & (start < len(end))]
    above = np.array([branchings.get(s, s - 1) for s in start.tolist()], np.int64)
    parent = np.where(above < first, -1, np.searchsorted(start, above, side="right") - 1)
    level = np.zeros(len(start), np.int64)
    for s in np.flatnonzero(parent >= 0):
        level[s] = level[parent[s]] + 1
    length = np.diff(start, append=len(end))
    inner = np.isin(start + length - 1, kept)
    inner[parent[parent >= 0]] = True
    return Segments(start, length, above, parent, level, inner)


def junctions(end: Ints, bounds: Ints) -> Ints:
    """The nodes whose state is asked for beyond a bound, if the preorder is cut at `bounds`; sorted."""
    branchings = _branchings(end)
    hangs = np.array(
        [*branchings, *(s for s in bounds.tolist() if 0 < s < len(end) and s not in branchings)], np.int64
    )
    above = np.array([branchings.get(s, s - 1) for s in hangs.tolist()], np.int64)
    across = np.searchsorted(bounds, hangs, side="right") > np.searchsorted(bounds, above, side="right")
    return np.unique(above[across & (above >= 0)])


def _branchings(end: Ints) -> dict[int, int]:
    """Each node that isn't its predecessor's child, and its parent, -1 for a root."""
    ends, found = end.tolist(), dict[int, int]()
    open_runs: list[tuple[int, int]] = []  # [start, stop) of the runs that the path so far is made of
    start = 0
    for node in (np.flatnonzero(end[:-1] == np.arange(1, len(end))) + 1).tolist():
        open_runs.append((start, node))
        start = node
        while open_runs and ends[open_runs[-1][0]] <= node:
            open_runs.pop()
        if not open_runs:
            found[node] = -1
            continue
        # Within a run `end` falls, so the nodes that are still open are its first ones.
        first, stop = open_runs.pop()
        closed = int(np.searchsorted(-end[first:stop], -node, side="left"))
        found[node] = first + closed - 1
        open_runs.append((first, first + closed))
    return found


@dataclass(frozen=True)
class Group:
    """Segments of one level that go through a layer in one call, padded on the right to T places.

    nodes: int64 [n], segment after segment. index: int64 [B, T], the node at each place, any at padding. places:
    int64 [n], where among the B·T places the nodes stand. padding: bool [B, T], or None without any. lengths: int64
    [B]. kept: int64 [K], the segments whose last state is asked for, and last: int64 [K], their last nodes. begins:
    int64 [B], which of the states of the level above each begins in; None for roots. All nodes are counted from the
    first one that is computed.
    """

    nodes: Ints
    index: Tensor
    places: Tensor
    padding: Tensor | None
    kept: Tensor
    lengths: Tensor
    last: list[int]
    begins: Tensor | None


class Levels(NamedTuple):
    """groups by level; of the nodes in their order, int64 [N], where those of the forest stand; and path: the nodes
    computed before whose states the first level begins in."""

    groups: list[list[Group]]
    order: Tensor
    path: Ints


def levels(plan: Plan, _window: int | None = None) -> Levels:
    """How a recurrent layer goes through the nodes of a plan."""
    tree = segments(plan.end, plan.first, plan.kept)
    path = np.unique(tree.above[(tree.parent < 0) & (tree.above >= 0)])
    found = list[list[Group]]()
    begins = np.where(tree.above < 0, -1, np.searchsorted(path, tree.above))
    for level in range(int(tree.level.max()) + 1):
        members = np.flatnonzero(tree.level == level)
        roots = tree.above[members] < 0
        parts = [part for side in (members[roots], members[~roots]) for part in _alike(side, tree.length)]
        found.append([_group(tree, part, begins, plan) for part in parts])
        kept = np.concatenate([part[tree.inner[part]] for part in parts])
        state = np.zeros(len(tree.start), np.int64)
        state[kept] = np.arange(len(kept))
        below = np.flatnonzero(tree.level == level + 1)
        begins[below] = state[tree.parent[below]]
    order = np.argsort(np.concatenate([group.nodes for part in found for group in part]))
    return Levels(found, torch.from_numpy(order).to(plan.device), path)


def _alike(members: Ints, length: Ints) -> Iterator[Ints]:
    """Parts in which the shortest segment lacks at most ROOM tokens or a quarter of the longest."""
    longest_first = members[np.argsort(-length[members], kind="stable")]
    while len(longest_first):
        most = int(length[longest_first[0]])
        count = int((length[longest_first] >= most - max(ROOM, most // 4)).sum())
        yield longest_first[:count]
        longest_first = longest_first[count:]


def _group(tree: Segments, members: Ints, begins: Ints, plan: Plan) -> Group:
    length, start = tree.length[members], tree.start[members] - plan.first
    # At least two places: for a single token some layers write into the state that they are given.
    place = np.arange(max(2, int(length.max())))
    real = place < length[:, None]
    index = start[:, None] + np.minimum(place, length[:, None] - 1)
    kept = np.flatnonzero(tree.inner[members])

    def put(a: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(a).to(plan.device)

    return Group(
        nodes=index[real], index=put(index), places=put(np.flatnonzero(real)),
        padding=None if real.all() else put(~real), kept=put(kept), lengths=put(length),
        last=(start + length - 1)[kept].tolist(),
        begins=None if tree.above[members[0]] < 0 else put(begins[members]),
    )  # fmt: skip
