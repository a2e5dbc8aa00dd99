"""Longer than memory: a forest in chunks of its preorder, exact.

At any cut of the preorder the nodes that are still open form one path, so what a chunk needs of all that came
before are the keys and values of that path: a stack. How gradients are made of it is told in `recompute`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..forest import Forest, Ints
from . import memory, recurrent
from .families import check, config_of, decoder_of, feed
from .plan import CHAINS, KeysValues, Plan

LEAST = 2048  # fed tokens of a chunk, however little memory there is
PASS = 64  # tokens, forward and backward, that a further chunk costs as much as


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
    be. bounds: where chunks begin, and F, if not there.
    """

    model: Any
    token: Ints
    depth: Ints
    end: Ints
    order: Ints
    size: int
    route: str = "auto"
    needed: Ints | None = None
    longest_last: bool = False
    bounds: Ints | None = None

    @classmethod
    def of(cls, model: nn.Module, forest: Forest, chunk: int, route: str, needed: Ints | None = None) -> Run:
        """Raises ConfigError for chunk < 1, ModelError for a model that can't be fed so."""
        if chunk < 1:
            raise ConfigError(f"chunk is {chunk}", fix="give at least 1 token; 512 to 4096 is usual")
        check(model)
        if chunk < len(forest.fed) and recurrent.mixers(decoder_of(model)):
            raise ModelError(
                f"a forest of {len(forest.fed):,} tokens can't be computed in chunks of {chunk:,}",
                where=type(model).__name__,
                why="its recurrent layers keep their states within one pass",
                fix=f"give chunk={len(forest.fed)}, or smaller packs",
            )
        if torch.is_grad_enabled() and model.training and any(map(_reentrant, model.modules())):
            raise ModelError(
                "reentrant gradient checkpointing loses the gradients of keys and values between chunks",
                fix='gradient_checkpointing_kwargs={"use_reentrant": False}, which is the better one anyway',
            )
        fed = forest.fed
        order = np.arange(len(fed))
        return cls(model, forest.token[fed], forest.depth[fed], forest.fed_end, order, chunk, route, needed)

    def for_gradients(self) -> Run:
        """The same in the order and the chunks in which least is computed twice."""
        return replace(self._ordered(_by_size(self.end, largest="last")), longest_last=True)

    def holding(self) -> Run | None:
        """The same with a first chunk that is held until the others, which see no node beyond it, are done.

        Nothing is computed twice then. None where no such chunks fit, or more of them would cost more than that.
        """
        run = self._ordered(_by_size(self.end, largest="first"))
        bounds, other = _held_bounds(run.end, self.size), self.for_gradients()
        if bounds is None or 3 * PASS * (len(bounds) - 1 - len(other.chunks)) > len(other.trunk):
            return None
        return replace(run, bounds=bounds)

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
        )  # fmt: skip

    @cached_property
    def decoder(self) -> Any:
        return decoder_of(self.model)

    @cached_property
    def device(self) -> torch.device:
        return self.decoder.get_input_embeddings().weight.device

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Of equal length: one of a few tokens would cost as much as it holds."""
        found, path = list[Chunk](), np.zeros(0, np.int64)
        for start, stop in pairwise((self._equal() if self.bounds is None else self.bounds).tolist()):
            found.append(Chunk(start, stop, path))
            path = np.concatenate((path, np.arange(start, stop)))
            path = path[self.end[path] > stop]
        return found

    def _equal(self) -> Ints:
        length = len(self.end)
        equal = max(0, length - self.size) if self.longest_last else length
        return np.unique((*np.linspace(0, equal, -(-equal // self.size) + 1).astype(int), length))

    @property
    def holds(self) -> bool:
        """Whether the first chunk is held until the others, which see it, are done."""
        return self.bounds is not None and len(self.trunk) > 0

    @cached_property
    def trunk(self) -> Ints:
        """The nodes that some later chunk sees, sorted."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *(c.path for c in self.chunks)]))

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
        plan.past, plan.fresh = past, {}
        kind = self.device.type
        # Weights that autocast made without gradients must not be found by a pass that needs them.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            hidden = feed(self.decoder, plan, self.token[chunk.start : chunk.stop], self._needed_of(chunk))
        fresh, plan.fresh = plan.fresh, None  # what gradient checkpointing runs again is not kept again
        return hidden, fresh

    def _needed_of(self, chunk: Chunk) -> Ints | None:
        if self.needed is None:
            return None
        return self.needed[slice(*np.searchsorted(self.needed, [chunk.start, chunk.stop]))] - chunk.start

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, hidden [rows, H]) in order, without gradients; kept are the keys and values of the path alone."""
        stack: KeysValues = {}
        held = np.zeros(0, np.int64)
        for part in self.chunks:
            keep = torch.from_numpy(np.flatnonzero(np.isin(held, part.path))).to(self.device)
            stack = {layer: (k[:, :, keep], v[:, :, keep]) for layer, (k, v) in stack.items()}
            hidden, fresh = self(part, stack)
            yield slice(part.start, part.stop), hidden
            stack = {layer: _after(stack.get(layer), fresh[layer]) for layer in fresh}
            held = np.concatenate((part.path, np.arange(part.start, part.stop)))


def stream_hidden(
    model: nn.Module, forest: Forest, *, chunk: int, route: str = "auto", needed: Ints | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, hidden [rows, H]) in order, `chunk` rows at a time; no gradients.

    needed: see `hidden_states`. Raises ConfigError for chunk < 1, ModelError like `hidden_states`.
    """
    return Run.of(model, forest, chunk, route, needed).stream()


def _by_size(end: Ints, largest: str) -> Ints:
    """The preorder, int64 [F], in which of siblings the one with the largest subtree comes first, or last.

    Last: what small ones need of the path is then done with before most cuts, so that later chunks see less.
    """
    ends, order = end.tolist(), list[int]()
    sign = 1 if largest == "last" else -1

    def siblings(first: int, stop: int) -> list[int]:
        found = []
        while first < stop:
            found.append(first)
            first = ends[first]
        return sorted(found, key=lambda k: sign * (k - ends[k]))

    todo = siblings(0, len(ends))
    while todo:
        order.append(todo.pop())
        todo += siblings(order[-1] + 1, ends[order[-1]])
    return np.array(order, np.int64)


def _held_bounds(end: Ints, size: int) -> Ints | None:
    """Bounds of chunks of which all but the first see only nodes of that one, and fit into `size` together with it.

    end: of a preorder in which the largest subtree comes first, so that it begins with a path, of which the first
    chunk takes as few nodes as will do. What hangs on it are subtrees, and chunks are made of whole ones.
    """
    ends, length = end.tolist(), len(end)
    second = ends[0]
    largest = ends[second] - second if second < length else 0  # of all but the one in which the path goes on
    for held in range(size - size // 4 + 1):  # with less than a quarter of the room, chunks would be many
        if max(largest, ends[held] - held) <= size - held:
            return _whole_subtrees(ends, held, size - held)
        if ends[held] == held + 1:  # the path ends here
            return None
        second = ends[held + 1]
        if second < ends[held]:
            largest = max(largest, ends[second] - second)
    return None


def _whole_subtrees(ends: list[int], held: int, room: int) -> Ints:
    bounds = [0, held] if held else [0]
    at = held
    while at < len(ends):
        if ends[at] - bounds[-1] > room:
            bounds.append(at)
        at = ends[at]
    return np.array([*bounds, len(ends)])


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
    config = config_of(model)
    device = decoder_of(model).get_input_embeddings().weight.device
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide = 18 * config.hidden_size + 4 * int(np.max(inner))  # one for all layers, or of each
    layers = config.num_hidden_layers
    if not torch.is_grad_enabled():
        values = wide
    elif model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        values = wide + layers * config.hidden_size
    else:
        values = wide * layers
    return max(LEAST, memory.total(device) // (2 * 4 * values))
