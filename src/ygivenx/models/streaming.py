"""Longer than memory: a forest in chunks of its preorder, exact, gradients included.

At any cut of the preorder the nodes that are still open form one path, so what a chunk needs of all that came
before are the keys and values of that path: a stack. For gradients the chunks are run a second time, last
chunk first, and what flows into the path's keys and values is kept until the chunk they came from is due. Only the
last chunk is computed once, so it is as long as chunks may be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..forest import Forest, Ints
from .families import check, config_of, decoder_of, feed
from .plan import KeysValues, Plan

LEAST = 2048  # fed tokens of a chunk, however little memory there is


@dataclass(frozen=True)
class Chunk:
    """Fed nodes [start, stop), and the nodes `path` [P] before them that some of them see."""

    start: int
    stop: int
    path: Ints


@dataclass(frozen=True, eq=False)
class Run:
    """A model and a forest of which it is fed one chunk at a time."""

    model: Any
    forest: Forest
    route: str
    size: int
    needed: Ints | None = None
    twice: bool = False

    @cached_property
    def decoder(self) -> Any:
        return decoder_of(self.model)

    @cached_property
    def device(self) -> torch.device:
        return self.decoder.get_input_embeddings().weight.device

    def chunks(self) -> Iterator[Chunk]:
        end = self.forest.fed_end
        path = np.zeros(0, np.int64)
        # Of equal length: one of a few tokens would cost as much as it holds. But the last one is computed once.
        equal = max(0, len(end) - self.size) if self.twice else len(end)
        bounds = np.linspace(0, equal, -(-equal // self.size) + 1).astype(int)
        for start, stop in pairwise(np.unique((*bounds, len(end))).tolist()):
            yield Chunk(start, stop, path)
            path = np.concatenate((path, np.arange(start, stop)))
            path = path[end[path] > stop]

    def __call__(self, chunk: Chunk, past: KeysValues) -> tuple[Tensor, KeysValues]:
        """(hidden [stop - start, H], the chunk's own keys and values), given those of its path."""
        end, fed = self.forest.fed_end, self.forest.fed
        seen = np.concatenate((chunk.path, np.arange(chunk.start, chunk.stop)))
        plan = Plan.of(
            np.searchsorted(seen, end[seen]),
            self.forest.depth[fed[seen]],
            self.device,
            "auto" if self.route == "plain" else self.route,
            first=len(chunk.path),
        )
        plan.past, plan.fresh = past, {}
        kind = self.device.type
        # Weights that autocast made without gradients must not be found by a pass that needs them.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            token = self.forest.token[fed[chunk.start : chunk.stop]]
            hidden = feed(self.decoder, plan, token, self._needed_of(chunk))
        fresh, plan.fresh = plan.fresh, None  # what gradient checkpointing runs again is not kept again
        return hidden, fresh

    def _needed_of(self, chunk: Chunk) -> Ints | None:
        if self.needed is None:
            return None
        return self.needed[slice(*np.searchsorted(self.needed, [chunk.start, chunk.stop]))] - chunk.start


@torch.no_grad()
def stream_hidden(
    model: nn.Module, forest: Forest, *, chunk: int, route: str = "auto", needed: Ints | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, hidden [rows, H]) in order, `chunk` rows at a time; no gradients.

    needed: see `hidden_states`. Only the keys and values of the current path are kept. Raises ConfigError for
    chunk < 1, ModelError like `hidden_states`.
    """
    run = _run(model, forest, route, chunk, needed)
    stack: KeysValues = {}
    held = np.zeros(0, np.int64)
    for part in run.chunks():
        keep = torch.from_numpy(np.flatnonzero(np.isin(held, part.path))).to(run.device)
        stack = {layer: (k[:, :, keep], v[:, :, keep]) for layer, (k, v) in stack.items()}
        hidden, fresh = run(part, stack)
        yield slice(part.start, part.stop), hidden
        stack = {layer: _after(stack.get(layer), fresh[layer]) for layer in fresh}
        held = np.concatenate((part.path, np.arange(part.start, part.stop)))


def _after(past: tuple[Tensor, Tensor] | None, fresh: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if past is None:
        return fresh
    return torch.cat((past[0], fresh[0]), 2), torch.cat((past[1], fresh[1]), 2)


def streamed(
    model: nn.Module, forest: Forest, chunk: int, route: str = "auto", needed: Ints | None = None
) -> Tensor:
    """`hidden_states`, differentiable, computed `chunk` rows at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not parameters:
        parts = stream_hidden(model, forest, chunk=chunk, route=route, needed=needed)
        return torch.cat([hidden for _, hidden in parts])
    return _Streamed.apply(_run(model, forest, route, chunk, needed, twice=True), *parameters)


def _run(
    model: nn.Module, forest: Forest, route: str, chunk: int, needed: Ints | None, *, twice: bool = False
) -> Run:
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}", fix="give at least 1 token; 512 to 4096 is usual")
    check(model)
    if any(map(_reentrant, model.modules())):
        raise ModelError(
            "reentrant gradient checkpointing loses the gradients of keys and values between chunks",
            fix='gradient_checkpointing_kwargs={"use_reentrant": False}, which is the better one anyway',
        )
    return Run(model, forest, route, chunk, needed, twice)


def _reentrant(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or not isinstance(function, partial):
        return False
    return bool(function.keywords.get("use_reentrant", True))


class _Shelf:
    """Keys and values of all fed nodes by layer, or the gradients that flow into them."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.kept: KeysValues = {}

    def __getitem__(self, nodes: slice | Tensor) -> KeysValues:
        return {layer: (k[:, :, nodes], v[:, :, nodes]) for layer, (k, v) in self.kept.items()}

    def add(
        self, nodes: slice | Tensor, values: Mapping[nn.Module, tuple[Tensor | None, Tensor | None]]
    ) -> None:
        for layer, parts in values.items():
            key, value = parts
            if key is None or value is None:  # a sliding window that has left the whole path behind
                continue
            if layer not in self.kept:
                self.kept[layer] = self._empty(key), self._empty(value)
            for whole, part in zip(self.kept[layer], (key, value), strict=True):
                whole[:, :, nodes] += part

    def _empty(self, like: Tensor) -> Tensor:
        n, heads, _, width = like.shape
        return like.new_zeros(n, self.length, heads, width).transpose(1, 2)


@dataclass
class _Pass:
    """A chunk computed with gradients: `leaves` are the keys and values of its path."""

    hidden: Tensor
    fresh: KeysValues
    leaves: KeysValues

    @classmethod
    def of(cls, run: Run, chunk: Chunk, shelf: _Shelf) -> _Pass:
        path = torch.from_numpy(chunk.path).to(run.device)
        leaves = {layer: (_leaf(k), _leaf(v)) for layer, (k, v) in shelf[path].items() if len(path)}
        with torch.enable_grad():
            return cls(*run(chunk, leaves), leaves)


class _Streamed(torch.autograd.Function):
    """Chunks forward without gradients; backward again in reverse, each with the path's keys as leaves.

    Only the last chunk is computed once: nothing comes between its forward and its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, *parameters: Tensor) -> Tensor:
        shelf = _Shelf(len(run.forest.fed))
        rows = []
        ctx.surroundings = []
        *chunks, last = run.chunks()
        for chunk in chunks:
            ctx.surroundings.append(_Surroundings(run.device))
            hidden, fresh = run(chunk, shelf[torch.from_numpy(chunk.path).to(run.device)])
            shelf.add(slice(chunk.start, chunk.stop), fresh)
            rows.append(hidden)
        ctx.surroundings.append(_Surroundings(run.device))
        ctx.last = _Pass.of(run, last, shelf)
        ctx.run, ctx.shelf = run, shelf
        ctx.save_for_backward(*parameters)
        return torch.cat([*rows, ctx.last.hidden.detach()])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        totals: list[Tensor | None] = [None] * len(parameters)
        into = _Shelf(ctx.shelf.length)
        done, ctx.last = ctx.last, None
        for chunk, surroundings in reversed(list(zip(ctx.run.chunks(), ctx.surroundings, strict=True))):
            if done is None:
                with surroundings.again():
                    done = _Pass.of(ctx.run, chunk, ctx.shelf)
            own = slice(chunk.start, chunk.stop)
            outputs = [(done.hidden, grad[own])]
            for layer, into_layer in into[own].items():
                outputs += zip(done.fresh[layer], into_layer, strict=True)
            made = _gradients(outputs, [*parameters, *(t for pair in done.leaves.values() for t in pair)])
            _accumulate(totals, made[: len(parameters)])
            pairs = zip(made[len(parameters) :: 2], made[len(parameters) + 1 :: 2], strict=True)
            into.add(torch.from_numpy(chunk.path), dict(zip(done.leaves, pairs, strict=True)))
            done = None
        return None, *totals


def _leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()


def _gradients(outputs: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    # With adapters, the first keys may depend on nothing that is trained.
    reached = [(o, g) for o, g in outputs if o.requires_grad]
    if not reached:
        return (None,) * len(inputs)
    return torch.autograd.grad([o for o, _ in reached], inputs, [g for _, g in reached], allow_unused=True)


def _accumulate(totals: list[Tensor | None], parts: tuple[Tensor | None, ...]) -> None:
    for i, part in enumerate(parts):
        total = totals[i]
        if part is not None:
            totals[i] = part if total is None else total.add_(part)


class _Surroundings:
    """The random state and the autocast that a chunk was computed in, to compute it again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.random = torch.get_rng_state()
        self.device_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    @contextmanager
    def again(self) -> Iterator[None]:
        enabled, dtype = self.autocast
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.autocast(self.device.type, dtype, enabled):
            torch.set_rng_state(self.random)
            if self.device_random is not None:
                torch.cuda.set_rng_state(self.device_random, self.device)
            yield


# -- when ------------------------------------------------------------------------------------------------


def automatic(model: Any) -> int:
    """Fed tokens that fit into half of the memory of the model's device: longer forests are streamed in such chunks.

    It counts what autograd keeps of a layer (about 18 hidden and 4 intermediate values per token); with gradient
    checkpointing one layer of that, and the input of each. Without gradients next to nothing is kept.
    """
    config = config_of(model)
    device = decoder_of(model).get_input_embeddings().weight.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wide = 18 * config.hidden_size + 4 * (
        getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    )
    layers = config.num_hidden_layers
    if not torch.is_grad_enabled():
        values = wide
    elif model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        values = wide + layers * config.hidden_size
    else:
        values = wide * layers
    return max(LEAST, memory // (2 * 4 * values))
