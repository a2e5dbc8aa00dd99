"""The segments of a forest: runs without branches, which recurrent layers compute from their parent's state.

Segments of one level, those with equally many segments above them, don't need each other: a layer is called once
or a few times per level, and not once per segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..forest import Ints
from .plan import Plan

ROOM = 64  # padding up to which a further call would cost more; the chunk of the delta rule


class Segments(NamedTuple):
    """Segments in preorder: s holds the nodes start[s] to start[s] + length[s].

    start, length, level: int64 [S]. parent: int64 [S], the segment above, -1 for a root. inner: bool [S], whether
    another segment begins where it ends.

    >>> segments(np.array([6, 6, 4, 4, 6, 6])).start  # two nodes, then a branch of two and another of two
    array([0, 2, 4])
    """

    start: Ints
    length: Ints
    parent: Ints
    level: Ints
    inner: npt.NDArray[np.bool_]


def segments(end: Ints) -> Segments:
    """The segments of a forest given by `end`, int64 [N], one past the subtree of each node."""
    above = _branchings(end)
    # A branching cuts twice: where the new branch begins, and behind the node that it hangs on.
    cuts = [0, *above, *(node + 1 for node in above.values() if node >= 0)]
    start = np.unique(np.array(cuts, np.int64))[: len(end)]
    before = np.array([above.get(s, s - 1) for s in start.tolist()], np.int64)
    parent = np.where(before < 0, -1, np.searchsorted(start, before, side="right") - 1)
    level = np.zeros(len(start), np.int64)
    for s in np.flatnonzero(parent >= 0):
        level[s] = level[parent[s]] + 1
    inner = np.zeros(len(start), bool)
    inner[parent[parent >= 0]] = True
    return Segments(start, np.diff(start, append=len(end)), parent, level, inner)


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
    int64 [n], where among the B·T places the nodes stand. padding: bool [B, T], or None without any. kept: int64
    [K], the segments whose last state others begin in, and stops: int64 [K], their lengths. begins: int64 [B],
    which of the states that the level above kept each begins in; None for roots.
    """

    nodes: Ints
    index: Tensor
    places: Tensor
    padding: Tensor | None
    kept: Tensor
    stops: Tensor
    begins: Tensor | None


def levels(plan: Plan, _window: int | None = None) -> tuple[list[list[Group]], Tensor]:
    """(groups by level, the order int64 [N] in which their nodes are those of the forest)."""
    tree = segments(plan.end)
    found, state = list[list[Group]](), np.full(len(tree.start), -1)
    for level in range(int(tree.level.max()) + 1):
        members = np.flatnonzero(tree.level == level)
        parts = list(_alike(members[np.argsort(-tree.length[members], kind="stable")], tree.length))
        found.append([_group(tree, part, state, plan.device) for part in parts])
        kept = np.concatenate([part[tree.inner[part]] for part in parts])
        state[kept] = np.arange(len(kept))
    order = np.argsort(np.concatenate([group.nodes for part in found for group in part]))
    return found, torch.from_numpy(order).to(plan.device)


def _alike(longest_first: Ints, length: Ints) -> Iterator[Ints]:
    """Parts in which the shortest segment lacks at most ROOM tokens or a quarter of the longest."""
    while len(longest_first):
        most = int(length[longest_first[0]])
        count = int((length[longest_first] >= most - max(ROOM, most // 4)).sum())
        yield longest_first[:count]
        longest_first = longest_first[count:]


def _group(tree: Segments, members: Ints, state: Ints, device: torch.device) -> Group:
    length, start = tree.length[members], tree.start[members]
    # At least two places: for a single token some layers write into the state that they are given.
    place = np.arange(max(2, int(length.max())))
    real = place < length[:, None]
    index = start[:, None] + np.minimum(place, length[:, None] - 1)
    kept = np.flatnonzero(tree.inner[members])
    root = tree.parent[members[0]] < 0

    def put(a: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(a).to(device)

    return Group(
        nodes=index[real], index=put(index), places=put(np.flatnonzero(real)),
        padding=None if real.all() else put(~real), kept=put(kept), stops=put(length[kept]),
        begins=None if root else put(state[tree.parent[members]]),
    )  # fmt: skip
