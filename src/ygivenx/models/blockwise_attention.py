"""Attention over a forest on a CPU: blocks of queries, each with itself and with the path that leads to it.

Every block is one or two calls of torch's flash kernel, which never makes more scores than it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..forest import Ints
from .plan import Plan

QUERIES_PER_BLOCK = 128  # of a block that holds more than one segment
MANY = 192  # queries from which torch's flash kernel takes blocks of 64 of them or more, not of 32
LONG = 512  # keys with which paths must begin alike for the blocks they lead to to see them together

Runs = tuple[slice, ...]  # nodes, as runs of neighbours


@dataclass(frozen=True)
class Tile:
    """Queries `rows` that see the nodes `keys`: all of them, those up to their own (`causal`), or those of the mask.

    mask: float [rows, keys], 0 or -inf.
    """

    rows: Runs
    keys: Runs
    mask: Tensor | None = None
    causal: bool = False

    @property
    def alike(self) -> bool:
        """Whether all queries see the same keys."""
        return not self.causal and self.mask is None

    @property
    def count(self) -> int:
        """How many queries."""
        return sum(run.stop - run.start for run in self.rows)


class Tiles(NamedTuple):
    """near: each query once, with what stands in its own block. far: with the path that leads to whole blocks."""

    near: list[Tile]
    far: list[Tile]


def make_tiles(plan: Plan, window: int | None) -> Tiles:
    """Long segments are blocks of their own, short ones are gathered; with a window all are short.

    Blocks that one path leads to, such as the questions after a passage, see it together wherever they stand: the
    kernel does best with many queries there, and with few in a block's own part.
    """
    near, paths = list[Tile](), dict[bytes, tuple[Ints, list[Ints]]]()
    path = np.zeros(0, np.int64)
    for start, stop in _cuts(plan, window):
        tile, path = _block(plan, start, stop, window, path)
        near.append(tile)
        if len(path):
            paths.setdefault(path.tobytes(), (path, []))[1].append(np.arange(start, stop) - plan.first)
    far = _together([_Far(path, np.concatenate(rows)) for path, rows in paths.values()])
    return Tiles(near, [Tile(_runs(part.rows), _runs(part.path)) for part in far])


class _Far(NamedTuple):
    """Queries that all see a path."""

    path: Ints
    rows: Ints


def _together(parts: list[_Far], seen: int = 0) -> Iterator[_Far]:
    """The same in larger parts: what paths begin with alike is seen at once, by most queries times keys first.

    Each path is an unbroken line of descent, so that it begins with another if it has the other's last node in the same
    place. Of each, what stands before `seen` is seen already.
    """

    def begins(part: _Far, path: Ints) -> bool:
        return len(part.path) >= len(path) and part.path[len(path) - 1] == path[-1]

    def product(shared: tuple[Ints, list[_Far]]) -> int:
        path, group = shared
        return (len(path) - seen) * sum(len(part.rows) for part in group)

    while True:
        paths = [part.path for part in parts if len(part.path) - seen >= LONG]
        groups = [(path, [part for part in parts if begins(part, path)]) for path in paths]
        shared = [(path, group) for path, group in groups if len(group) > 1]
        if not shared:
            break
        path, group = max(shared, key=product)
        yield _Far(path[seen:], np.sort(np.concatenate([part.rows for part in group])))
        yield from _together([part for part in group if len(part.path) > len(path)], len(path))
        parts = [part for part in parts if not begins(part, path)]
    yield from (_Far(part.path[seen:], part.rows) for part in parts)


def _cuts(plan: Plan, window: int | None) -> list[tuple[int, int]]:
    # Neighbours with the same end are a chain without branches: a segment.
    bounds = plan.first + np.flatnonzero(np.diff(plan.end[plan.first :], prepend=-1, append=-1))
    if window is not None:
        bounds = np.unique(np.concatenate((bounds, np.arange(plan.first, len(plan.end), QUERIES_PER_BLOCK))))
    cuts, start = [], plan.first
    for here, after in pairwise(bounds.tolist()):
        if after - start > QUERIES_PER_BLOCK and here > start:
            cuts.append((start, here))
            start = here
    return [*cuts, (start, len(plan.end))]


def _block(plan: Plan, start: int, stop: int, window: int | None, before: Ints) -> tuple[Tile, Ints]:
    """Queries [start, stop) with their near keys, and the path, seen by all of them, that isn't among those.

    It is `before`, the path of the block before, if what it lacks is little.
    """
    end, depth, rows = plan.end, plan.depth, (slice(start - plan.first, stop - plan.first),)
    keys = np.flatnonzero(end[:start] > start)  # the path from the root to here
    everywhere = end[keys] >= stop
    if window is not None:
        inside = depth[start:stop]
        keys, everywhere = (a[depth[keys] > inside.min() - window] for a in (keys, everywhere))
        everywhere &= depth[keys] > inside.max() - window
    path = keys[everywhere]
    one = bool((end[start:stop] == end[start]).all()) and everywhere.all()
    if one and (window is None or stop - start <= window):
        return Tile(rows, (slice(start, stop),), causal=True), path
    if len(path) - len(before) <= QUERIES_PER_BLOCK // 2 and np.array_equal(path[: len(before)], before):
        path = before
    near = np.concatenate((np.setdiff1d(keys, path), np.arange(start, stop)))
    q = np.arange(start, stop)[:, None]
    allowed = (near <= q) & (q < end[near])
    if window is not None:
        allowed &= depth[start:stop, None] - depth[near] < window
    mask = torch.zeros(allowed.shape).masked_fill_(torch.from_numpy(~allowed), -torch.inf)
    return Tile(rows, _runs(near), mask), path


def _runs(nodes: Ints) -> Runs:
    starts = np.flatnonzero(np.diff(nodes, prepend=-2) != 1)
    stops = np.append(starts, len(nodes))[1:]
    return tuple(slice(int(nodes[a]), int(nodes[b - 1]) + 1) for a, b in zip(starts, stops, strict=True))


def _take(values: Tensor, runs: Runs) -> Tensor:
    """Those nodes of [1, heads, F, D]; without a copy where they are one run."""
    parts = [values[:, :, run] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _parts(values: Tensor, runs: Runs) -> tuple[Tensor, ...]:
    """What belongs to each run of a tile's result [1, heads, F, ...]."""
    parts: tuple[Tensor, ...] = values.split([run.stop - run.start for run in runs], 2)
    return parts


def _add(total: Tensor, runs: Runs, parts: Tensor) -> None:
    """Adds each part [1, heads, F, D] of a batch: a sum over the batch first would take three times as long."""
    for run, pieces in zip(runs, _parts(parts, runs), strict=True):
        place = total[:, :, run]
        for piece in pieces.split(1):
            place += piece


class _Fold(NamedTuple):
    """Query heads that share a key head, written as further rows of it.

    [1, heads, R, ...] becomes [batch, key heads, heads / key heads * R / batch, ...]. With few rows the kernel takes
    small blocks, which cost more. Rows that don't all see the same keys stay as they are; their heads may still become
    a batch.
    """

    batch: int
    kv_heads: int
    groups: int
    few: bool  # rows, all of which see the same keys

    @classmethod
    def of(cls, tile: Tile, query: Tensor, key: Tensor) -> _Fold:
        few = tile.alike and tile.count < MANY
        return cls(1, key.shape[1], query.shape[1] // key.shape[1], few)

    def even(self, tile: Tile) -> _Fold:
        """The same with the batch that gives every thread as much to do as the others.

        The kernel's backward pass hands (batch, key head) pairs to threads: with three of them, one of two threads
        does two thirds of the work.
        """
        fits = {1, self.groups}
        if tile.alike:
            fits = {b for b in range(1, self.groups + 1) if self.groups * tile.count % b == 0}
        threads = torch.get_num_threads()
        return self._replace(batch=min(fits, key=lambda b: (-(-b * self.kv_heads // threads) / b, b)))

    @property
    def _nothing(self) -> bool:
        return self.groups == 1 or (self.batch == 1 and not self.few)

    def __call__(self, a: Tensor) -> Tensor:
        if self._nothing:
            return a
        grouped = a[0].unflatten(0, (self.kv_heads, self.groups))
        length = self.groups * a.shape[2] // self.batch
        batched: Tensor = grouped.reshape(self.kv_heads, self.batch, length, *a.shape[3:])
        return batched.transpose(0, 1)

    def back(self, a: Tensor) -> Tensor:
        if self._nothing:
            return a
        return a.transpose(0, 1).reshape(1, self.kv_heads * self.groups, -1, *a.shape[3:])


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Blocks(torch.autograd.Function):
    """Softmax over near and far keys by two flash calls, merged by their logsumexp (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, scale: float) -> Tensor:
        n, heads, length, _ = query.shape
        out = _empty(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(n, length, heads, dtype=wide).transpose(1, 2)

        def attended(t: Tile) -> Iterator[tuple[slice, Tensor, Tensor]]:
            fold = _Fold.of(t, query, key)
            q = fold(_take(query, t.rows))
            part, part_lse = map(fold.back, _flash(q, _take(key, t.keys), _take(value, t.keys), 0.0, t.causal,
                                                   attn_mask=_like(t.mask, q), scale=scale))  # fmt: skip
            yield from zip(t.rows, _parts(part, t.rows), _parts(part_lse, t.rows), strict=True)

        for run, part, part_lse in chain.from_iterable(map(attended, tiles.near)):
            out[:, :, run], lse[:, :, run] = part, part_lse
        for run, part, part_lse in chain.from_iterable(map(attended, tiles.far)):
            o, total = out[:, :, run], lse[:, :, run]
            torch.logaddexp(total, part_lse, out=total)
            o.lerp_(part, (part_lse - total).exp_()[..., None].to(part.dtype))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With the merged output and logsumexp, each part's gradient is that of its share of the whole.
        query, key, value, out, lse = ctx.saved_tensors
        d_query, d_key, d_value = _empty(query), _zeros(key), _zeros(value)

        def share(t: Tile) -> Tensor:
            """Of the gradient of the tile's queries; that of its keys and values is added."""
            fold = _Fold.of(t, query, key).even(t)
            g, q, o, total = (fold(_take(a, t.rows)) for a in (grad, query, out, lse))
            k, v = (_take(a, t.keys).expand(fold.batch, -1, -1, -1) for a in (key, value))
            dq, dk, dv = _flash_backward(
                g, q, k, v, o, total, 0.0, t.causal, attn_mask=_like(t.mask, q), scale=ctx.scale
            )
            _add(d_key, t.keys, dk)
            _add(d_value, t.keys, dv)
            return fold.back(dq)

        for t in ctx.tiles.near:  # each query once
            for run, part in zip(t.rows, _parts(share(t), t.rows), strict=True):
                d_query[:, :, run] = part
        for t in ctx.tiles.far:
            _add(d_query, t.rows, share(t))
        return d_query, d_key, d_value, None, None


def _like(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(query.dtype)


def _empty(like: Tensor) -> Tensor:
    """In the order of memory that the layers before want: [1, F, heads, D], transposed."""
    n, heads, length, width = like.shape
    return like.new_empty(n, length, heads, width).transpose(1, 2)


def _zeros(like: Tensor) -> Tensor:
    return _empty(like).zero_()
