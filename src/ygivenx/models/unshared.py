"""Sequences run by themselves: the route of decoders that can't compute a forest, and of any other on request.

A forest's fed nodes are covered by the paths to its leaves. Each path is run as the model runs any sequence, in batches
of similar length, padded on the right: a causal layer doesn't look ahead, so no token sees the padding. A node that
several paths hold is read from the first of them, which is exact since all of them give it the same hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..forest import Forest, Ints
from .families import embeddings_of, feed_sequences, refuse_unknown_ids
from .logits import head_input
from .plan import KeysValues
from .streaming import ONE_PASS, Chunk, uncached_autocast

SIMILAR = 0.75  # of the longest path of a batch; below that, more than a quarter of a row would be padding


@dataclass(frozen=True)
class Batch(Chunk):
    """Paths that are run together; its rows are [start, stop) of the run's order.

    ids: int64 [paths, longest], padded on the right. places: int64 [rows], where in the flattened ids each row is.
    """

    ids: Ints
    places: Ints


@dataclass(frozen=True, eq=False)
class UnsharedRun:
    """A model and a forest whose paths are run by themselves, in batches of at most `size` tokens where paths allow.

    order: int64 [F], which of the forest's fed nodes each row is. Otherwise it is used like `streaming.Run`.
    """

    model: Any
    decoder: Any
    chunks: list[Batch]
    order: Ints
    size: int
    trunk: Ints

    @classmethod
    def of(cls, model: Any, decoder: Any, forest: Forest, size: int) -> UnsharedRun:
        """Raises ModelError for an id that has no embedding."""
        token = forest.token[forest.fed]
        refuse_unknown_ids(decoder, token)
        batches, order = _batches(_leaf_paths(forest), token, size)
        return cls(model, decoder, batches, order, size, np.zeros(0, np.int64))

    @property
    def fits(self) -> bool:
        """Whether all of it may be in memory at once."""
        return sum(batch.ids.size for batch in self.chunks) <= self.size or len(self.chunks) == 1

    @cached_property
    def device(self) -> torch.device:
        return embeddings_of(self.decoder).device

    def for_gradients(self) -> UnsharedRun:
        """Itself: nothing is computed twice in any order."""
        return self

    def __call__(self, batch: Chunk, _past: KeysValues) -> tuple[Tensor, KeysValues]:
        """(hidden [stop - start, H], no keys and values: later batches need none)."""
        assert isinstance(batch, Batch)
        ids, places = (torch.from_numpy(a).to(self.device) for a in (batch.ids, batch.places))
        with uncached_autocast(self.device):
            hidden = feed_sequences(self.decoder, ids)
        own = hidden.flatten(0, 1).index_select(0, places.to(hidden.device))
        return own if self.model is self.decoder else head_input(self.model, own), {}

    def at_once(self) -> Tensor:
        """Hidden states [F, H] of all fed nodes, differentiable."""
        if not self.chunks:
            return embeddings_of(self.decoder)[:0]
        hidden = torch.cat([self(batch, {})[0] for batch in self.chunks])
        return hidden[torch.from_numpy(np.argsort(self.order)).to(hidden.device)]

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[Ints, Tensor]]:
        """(rows int64 [n], hidden [n, H]), batch by batch, without gradients."""
        for batch in self.chunks:
            yield self.order[batch.start : batch.stop], self(batch, {})[0]


def _leaf_paths(forest: Forest) -> list[tuple[int, Ints]]:
    """(its first own node, path) of each fed node without fed children, in preorder.

    A path's own nodes are those that no path before it holds. They stand side by side: after a leaf the preorder goes
    on with a node that branches off, and from there child by child to the next leaf.
    """
    depth = forest.depth[forest.fed]
    leaves = np.flatnonzero(forest.fed_end == np.arange(len(depth)) + 1)
    paths, start, path = list[tuple[int, Ints]](), 0, np.zeros(0, np.int64)
    for leaf in leaves.tolist():
        # The path branches off from the one before at the depth of its first own node.
        path = np.concatenate((path[: depth[start]], np.arange(start, leaf + 1)))
        paths.append((start, path))
        start = leaf + 1
    return paths


def _batches(paths: list[tuple[int, Ints]], token: Ints, size: int) -> tuple[list[Batch], Ints]:
    """(batches of paths of similar length, the order of the fed nodes in them)."""
    groups = list[list[tuple[int, Ints]]]()
    for start, path in sorted(paths, key=lambda p: -len(p[1])):
        # Longest first, so a group's first path is its longest, and its batch takes that much for each of its paths.
        longest = len(groups[-1][0][1]) if groups else 0
        similar = (
            len(path) >= SIMILAR * longest and (len(groups[-1]) + 1) * longest <= size if groups else False
        )
        if groups and (similar or size == ONE_PASS):
            groups[-1].append((start, path))
        else:
            groups.append([(start, path)])
    batches, order = list[Batch](), [np.zeros(0, np.int64)]
    row = 0
    for group in groups:
        own = [path[np.searchsorted(path, start) :] for start, path in group]
        batches.append(_batch(row, [path for _, path in group], own, token))
        order += own
        row = batches[-1].stop
    return batches, np.concatenate(order)


def _batch(row: int, paths: list[Ints], own: list[Ints], token: Ints) -> Batch:
    longest = max(map(len, paths))
    # Any id that the model knows will do; a row's own last token has no special meaning that the row lacks.
    ids = np.stack([np.pad(token[path], (0, longest - len(path)), mode="edge") for path in paths])
    places = [
        i * longest + np.arange(len(path) - len(nodes), len(path))
        for i, (path, nodes) in enumerate(zip(paths, own, strict=True))
    ]
    rows = np.concatenate(places)
    return Batch(row, row + len(rows), np.zeros(0, np.int64), ids, rows)
