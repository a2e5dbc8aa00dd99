"""Longer than memory: a forest in chunks of its preorder, exact.

At any cut of the preorder the nodes that are still open form one path, so what a chunk needs of all that came
before are the keys and values of that path: a stack.
`chunked_backward` makes gradients of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..choices import Route
from ..errors import ModelError
from ..forest import Forest, Ints
from . import memory, recurrent
from .families import config_of, decoder_of, embeddings_of, feed
from .logits import head_input
from .plan import CHAINS, NO_NODES, KeysValues, Plan, picked, renamed
from .segments import junctions

LEAST = 2048  # fed tokens of a chunk, however little memory there is
ONE_PASS = sys.maxsize  # as a chunk: all in one forward pass, as ranks with sharded weights need it


@dataclass(frozen=True)
class Chunk:
    """Fed nodes [start, stop), and the nodes `path` [P] before them that some of them see."""

    start: int
    stop: int
    path: Ints


@dataclass(frozen=True, eq=False)
class Run:
    """A model and a forest of which it is fed one chunk of at most `size` nodes at a time.

    token, depth, end: int64 [F], of the fed nodes. order: int64 [F], which of the forest's fed nodes each is. needed:
    see `hidden_states`. longest_last: all chunks are of equal length but the last one, which is as long as chunks may
    be. also: int64, nodes whose states of recurrent layers are asked for, though no chunk begins in them.
    """

    model: Any
    token: Ints
    depth: Ints
    end: Ints
    order: Ints
    size: int
    route: Route = "auto"
    needed: Ints | None = None
    longest_last: bool = False
    also: Ints = field(default_factory=lambda: NO_NODES)

    @classmethod
    def of(
        cls, model: nn.Module, forest: Forest, chunk: int, route: Route = "auto", needed: Ints | None = None
    ) -> Run:
        fed = forest.fed
        order = np.arange(len(fed))
        return cls(model, forest.token[fed], forest.depth[fed], forest.fed_end, order, chunk, route, needed)

    @property
    def fits(self) -> bool:
        """Whether all of it may be in memory at once."""
        return len(self.token) <= self.size

    def at_once(self) -> Tensor:
        """Hidden states [F, H] of all fed nodes, differentiable."""
        if not len(self.token):
            return embeddings_of(self.decoder)[:0]
        return head_input(
            self.model,
            feed(
                self.decoder, Plan.of(self.end, self.depth, self.device, self.route), self.token, self.needed
            ),
        )

    def for_gradients(self) -> Run:
        """The same in the order and the chunks in which least is computed twice."""
        return replace(self._ordered(_largest_last(self.end)), longest_last=True)

    def _ordered(self, order: Ints) -> Run:
        """The same in another preorder."""
        needed = None if self.needed is None else np.sort(np.argsort(order)[self.needed])
        size = (self.end - np.arange(len(order)))[order]
        return replace(
            self, token=self.token[order], depth=self.depth[order], end=np.arange(len(order)) + size,
            order=self.order[order], needed=needed,
        )  # fmt: skip

    def only(self, nodes: Ints) -> Run:
        """The fed nodes `nodes` alone, sorted, with all their ancestors, for the sake of their keys and values."""
        return replace(
            self, token=self.token[nodes], depth=self.depth[nodes], end=np.searchsorted(nodes, self.end[nodes]),
            order=self.order[nodes], needed=np.zeros(0, np.int64), longest_last=False,
            also=np.searchsorted(nodes, self.junctions),
        )  # fmt: skip

    @cached_property
    def decoder(self) -> Any:
        return decoder_of(self.model)

    @cached_property
    def device(self) -> torch.device:
        return embeddings_of(self.decoder).device

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Of equal length: one of a few tokens would cost as much as it holds."""
        found, path = list[Chunk](), np.zeros(0, np.int64)
        for start, stop in pairwise(self._bounds().tolist()):
            found.append(Chunk(start, stop, path))
            path = np.concatenate((path, np.arange(start, stop)))
            # Open are the nodes whose subtrees go on beyond the cut.
            path = path[self.end[path] > stop]
        return found

    def _bounds(self) -> Ints:
        length = len(self.end)
        equal = max(0, length - self.size) if self.longest_last else length
        return np.unique((*np.linspace(0, equal, -(-equal // self.size) + 1).astype(int), length))

    @cached_property
    def trunk(self) -> Ints:
        """The nodes that some later chunk sees, sorted."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *(c.path for c in self.chunks)]))

    @cached_property
    def junctions(self) -> Ints:
        """The nodes in whose states of recurrent layers some later chunk begins, sorted."""
        if not recurrent.mixers(self.decoder):
            return NO_NODES
        return np.union1d(junctions(self.end, self._bounds()), self.also)

    def __call__(self, chunk: Chunk, past: KeysValues) -> tuple[Tensor, KeysValues]:
        """(hidden [stop - start, H], the chunk's own keys and values), given those of its path."""
        seen = np.concatenate((chunk.path, np.arange(chunk.start, chunk.stop)))
        plan = Plan.of(
            np.searchsorted(seen, self.end[seen]),
            self.depth[seen],
            self.device,
            "auto" if self.route in CHAINS else self.route,
            first=len(chunk.path),
        )
        plan.past, plan.fresh = renamed(past, lambda node: int(np.searchsorted(seen, node))), {}
        own = self.junctions[slice(*np.searchsorted(self.junctions, [chunk.start, chunk.stop]))]
        plan.kept = np.searchsorted(seen, own)
        with uncached_autocast(self.device):
            hidden = feed(self.decoder, plan, self.token[chunk.start : chunk.stop], self._needed_of(chunk))
            hidden = head_input(self.model, hidden)
        fresh, plan.fresh = plan.fresh, None  # what gradient checkpointing runs again is not kept again
        return hidden, renamed(fresh, lambda place: int(seen[place]))

    def _needed_of(self, chunk: Chunk) -> Ints | None:
        if self.needed is None:
            return None
        return self.needed[slice(*np.searchsorted(self.needed, [chunk.start, chunk.stop]))] - chunk.start

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[Ints, Tensor]]:
        """(rows int64 [n], hidden [n, H]) in order, without gradients; only the path's keys and values are kept."""
        stack: KeysValues = {}
        held = np.zeros(0, np.int64)
        for part in self.chunks:
            # The stack is cut back to the path of the next chunk before anything is put on it.
            keep = torch.from_numpy(np.flatnonzero(np.isin(held, part.path))).to(self.device)
            stack = picked(stack, part.path, keep)
            hidden, fresh = self(part, stack)
            yield self.order[part.start : part.stop], hidden
            stack |= {place: _after(stack.get(place), pair) for place, pair in fresh.items()}
            held = np.concatenate((part.path, np.arange(part.start, part.stop)))


def uncached_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast as it is, without its cache: a pass with gradients must not find weights that were cast without."""
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )


def _largest_last(end: Ints) -> Ints:
    """The preorder, int64 [F], in which of siblings the one with the largest subtree comes last.

    What small subtrees need of the path is then done with before most cuts, so that later chunks see less of it.
    """
    ends, order = end.tolist(), list[int]()

    def siblings(first: int, stop: int) -> list[int]:
        # A node's next sibling stands where its own subtree ends.
        found = []
        while first < stop:
            found.append(first)
            first = ends[first]
        return sorted(found, key=lambda k: k - ends[k])

    todo = siblings(0, len(ends))
    while todo:
        order.append(todo.pop())
        todo += siblings(order[-1] + 1, ends[order[-1]])
    return np.array(order, np.int64)


def refuse_reentrant(model: nn.Module) -> None:
    """Raise ModelError where gradients of parts can't be made one by one."""
    if torch.is_grad_enabled() and model.training and any(map(_reentrant, model.modules())):
        raise ModelError(
            "reentrant gradient checkpointing loses the gradients of keys and values between chunks",
            fix='gradient_checkpointing_kwargs={"use_reentrant": False}, which is the better one anyway',
        )


def _reentrant(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or not isinstance(function, partial):
        return False
    return bool(function.keywords.get("use_reentrant", True))


def _after(past: tuple[Tensor, Tensor] | None, fresh: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if past is None:
        return fresh
    return torch.cat((past[0], fresh[0]), 2), torch.cat((past[1], fresh[1]), 2)


# -- when ------------------------------------------------------------------------------------------------


def automatic(model: Any) -> int:
    """Fed tokens that fit into half of the memory of the model's device: longer forests are streamed in such chunks.

    It counts what autograd keeps of a layer (about 18 hidden and 4 intermediate values per token); with gradient
    checkpointing one layer of that, and the input of each. Without gradients next to nothing is kept.
    """
    config, decoder = config_of(model), decoder_of(model)
    embeddings = embeddings_of(decoder)
    hidden = getattr(config, "hidden_size", None) or embeddings.shape[1]
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    wide = 18 * hidden + 4 * int(np.max(inner))  # one for all layers, or of each
    # BLT has no number of its own: its parts have one each.
    layers = getattr(config, "num_hidden_layers", None) or sum(
        len(m) for m in decoder.modules() if isinstance(m, nn.ModuleList)
    )
    if not torch.is_grad_enabled():
        values = wide
    elif model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        values = wide + layers * hidden
    else:
        values = wide * max(layers, 1)
    return max(LEAST, memory.total(embeddings.device) // int(2 * 4 * values))
