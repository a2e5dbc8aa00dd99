"""Gradients of a forest that is longer than memory: chunk by chunk, the last one first, exact.

Chunks are computed with gradients one at a time, and what flows into the keys and values of a chunk's path is kept
until the chunk they came from is due. For that the nodes that later chunks see, the trunk, are computed before without
gradients, and again when their chunk is due. No other node is computed twice, unless its hidden states are asked for
before the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..forest import Ints
from ..head.selective import refuse_second_derivatives
from .plan import KeysValues, Place, picked, renamed
from .streaming import Chunk, Run
from .unshared import UnsharedRun

AnyRun = Run | UnsharedRun
# The part of the loss that belongs to rows, int64 [n], of which these are the hidden states [n, H]
Score = Callable[[Ints, Tensor], Tensor]


def hidden_states(run: AnyRun) -> Tensor:
    """All hidden states [F, H], differentiable: computed first without gradients, then again for them."""
    parameters = _trained(run.decoder)
    if not parameters:
        rows, parts = zip(*run.stream(), strict=True)
        hidden = torch.cat(parts)
        return hidden[torch.from_numpy(np.argsort(np.concatenate(rows))).to(hidden.device)]
    run = run.for_gradients()
    hidden = _Hidden.apply(run, *parameters)  # type: ignore[no-untyped-call]
    every: Tensor = hidden[torch.from_numpy(np.argsort(run.order)).to(hidden.device)]
    return every


def loss(run: AnyRun, score: Score) -> Tensor:
    """The sum of the parts of the loss, differentiable once and, anew, again.

    The gradients are made at once, where the hidden states are at hand, and handed over in backward.
    """
    parameters = _trained(run.model)
    if not parameters:
        return torch.stack([score(rows, hidden) for rows, hidden in run.stream()]).sum()
    run = run.for_gradients()
    # Where the gradients can't be made at once, all hidden states are made first, and computed again for backward.
    store = None if _scaled(run) else _trunk(run)
    if store is None:
        return score(run.order, _Hidden.apply(run, *_trained(run.decoder)))  # type: ignore[no-untyped-call]
    value: Tensor = _Loss.apply(run, score, store, *parameters)  # type: ignore[no-untyped-call]
    return value


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []


def _scaled(run: AnyRun) -> bool:
    """float16 needs gradients that are scaled before they are made, and by how much is known in backward only."""
    kind = run.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return autocast or any(p.dtype == torch.float16 for p in run.model.parameters())


class _NodeStore:
    """Keys and values of the sorted nodes `nodes` by layer, or the gradients that flow into them."""

    def __init__(self, nodes: Ints, device: torch.device) -> None:
        self.nodes, self.device = nodes, device
        self.kept: KeysValues = {}

    def own(self, chunk: Chunk) -> Ints:
        """Those of the nodes that are the chunk's."""
        return self.nodes[slice(*np.searchsorted(self.nodes, [chunk.start, chunk.stop]))]

    def __getitem__(self, nodes: Ints) -> KeysValues:
        return picked(self.kept, nodes, self._places(nodes))

    def add(self, nodes: Ints, values: Mapping[Place, tuple[Tensor | None, Tensor | None]]) -> None:
        # What several chunks send to one node adds up; keys and values themselves come once, onto zeros.
        places = self._places(nodes)
        for layer, parts in values.items():
            key, value = parts
            if key is None or value is None:  # a sliding window that has left the whole path behind
                continue
            if isinstance(layer, tuple):
                before = self.kept.get(layer)
                self.kept[layer] = (key, value) if before is None else (before[0] + key, before[1] + value)
                continue
            if layer not in self.kept:
                self.kept[layer] = self._empty(key), self._empty(value)
            for whole, part in zip(self.kept[layer], (key, value), strict=True):
                whole[:, :, places] += part

    def _places(self, nodes: Ints) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.nodes, nodes)).to(self.device)

    def _empty(self, like: Tensor) -> Tensor:
        n, heads, _, width = like.shape
        return like.new_zeros(n, len(self.nodes), heads, width).transpose(1, 2)


def _own(values: KeysValues, nodes: Ints, chunk: Chunk) -> KeysValues:
    """Of a chunk's keys, values and states those of `nodes`."""
    # All of the chunk's nodes: nothing to pick.
    if len(nodes) == chunk.stop - chunk.start or not values:
        return values
    device = next(iter(values.values()))[0].device
    return picked(values, nodes, torch.from_numpy(nodes - chunk.start).to(device))


@torch.no_grad()
def _trunk(run: AnyRun) -> _NodeStore | None:
    """The trunk's keys and values; None if random numbers were drawn for them, which can't be drawn so again."""
    store, before = _NodeStore(run.trunk, run.device), _Surroundings(run.device)
    if isinstance(run, UnsharedRun) or not len(run.trunk):
        return store
    trunk = run.only(run.trunk)
    for chunk in trunk.chunks:
        # The run of the trunk counts its own nodes; the store goes by those of the whole run.
        path = store[run.trunk[chunk.path]]
        _, fresh = trunk(chunk, renamed(path, lambda node: int(np.searchsorted(run.trunk, node))))
        if before.drawn():
            before.restore()
            return None
        store.add(run.trunk[chunk.start : chunk.stop], renamed(fresh, lambda place: int(run.trunk[place])))
    return store


@dataclass
class _Pass:
    """A chunk computed with gradients: `leaves` are the keys and values of its path."""

    hidden: Tensor
    fresh: KeysValues
    leaves: KeysValues

    @classmethod
    def of(cls, run: AnyRun, chunk: Chunk, store: _NodeStore) -> _Pass:
        path = store[chunk.path] if len(chunk.path) else {}
        leaves = {layer: (_leaf(k), _leaf(v)) for layer, (k, v) in path.items()}
        with torch.enable_grad():
            hidden, fresh = run(chunk, leaves)
            return cls(hidden, _own(fresh, store.own(chunk), chunk), leaves)


class _Backward:
    """Backward through one chunk after another, the last one first."""

    def __init__(self, store: _NodeStore, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.totals: list[Tensor | None] = [None] * len(parameters)
        self.into = _NodeStore(store.nodes, store.device)

    def propagate(self, chunk: Chunk, done: _Pass, output: Tensor, grad: Tensor) -> None:
        """From `output`, which the chunk's hidden states went into, and from what later chunks made of its keys."""
        # Of the nodes that later chunks saw, their gradients have come in by now: those chunks were done before.
        outputs = [(output, grad)]
        for layer, into in self.into[self.into.own(chunk)].items():
            outputs += zip(done.fresh[layer], into, strict=True)
        leaves = [t for pair in done.leaves.values() for t in pair]
        # One call for all: gradients of parameters, and of the path's keys and values, which go on to earlier chunks.
        with _hooks_at_rest(self.parameters):
            gradients = _gradients(outputs, [*self.parameters, *leaves])
        n = len(self.parameters)
        _accumulate(self.totals, gradients[:n])
        pairs = zip(gradients[n::2], gradients[n + 1 :: 2], strict=True)
        both = (_both(pair, leaf) for pair, leaf in zip(pairs, done.leaves.values(), strict=True))
        self.into.add(chunk.path, dict(zip(done.leaves, both, strict=True)))


class _Loss(torch.autograd.Function):
    """The loss and all gradients in one descent from the last chunk to the first."""

    @staticmethod
    def forward(ctx: Any, run: AnyRun, score: Score, store: _NodeStore, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.score, ctx.surroundings = run, score, _Surroundings(run.device)
        value, ctx.gradients = _descend(run, score, store, list(parameters))
        ctx.save_for_backward(*parameters)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("a forest in chunks")
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward: the first one gave its gradients away
            with ctx.surroundings.restored():
                store = _trunk(ctx.run)
                assert store is not None
                gradients = _descend(ctx.run, ctx.score, store, list(ctx.saved_tensors))[1]
        if grad.device.type != "cpu" or grad.item() != 1:
            for g in gradients:
                if g is not None:
                    g.mul_(grad)
        return None, None, None, *gradients


def _descend(
    run: AnyRun, score: Score, store: _NodeStore, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """(the loss, the gradients of the parameters)."""
    backward, parts = _Backward(store, parameters), list[Tensor]()
    for chunk in reversed(run.chunks):
        done = _Pass.of(run, chunk, store)
        with torch.enable_grad():
            part = score(run.order[chunk.start : chunk.stop], done.hidden)
        backward.propagate(chunk, done, part, torch.ones_like(part))
        parts.append(part.detach())
        del done, part  # before the next chunk is computed
    return torch.stack(parts).sum(), backward.totals


class _Hidden(torch.autograd.Function):
    """Chunks forward without gradients; backward again in reverse.

    Only the last chunk is computed once: nothing comes between its forward and its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, run: AnyRun, *parameters: Tensor) -> Tensor:
        store, rows = _NodeStore(run.trunk, run.device), list[Tensor]()
        ctx.surroundings = []
        *before, last = run.chunks
        for chunk in before:
            ctx.surroundings.append(_Surroundings(run.device))
            hidden, fresh = run(chunk, store[chunk.path])
            store.add(store.own(chunk), _own(fresh, store.own(chunk), chunk))
            rows.append(hidden)
        ctx.surroundings.append(_Surroundings(run.device))
        ctx.last = _Pass.of(run, last, store)
        ctx.run, ctx.store = run, store
        ctx.save_for_backward(*parameters)
        return torch.cat([*rows, ctx.last.hidden.detach()])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("a forest in chunks")
        backward = _Backward(ctx.store, list(ctx.saved_tensors))
        done, ctx.last = ctx.last, None
        for chunk, surroundings in reversed(list(zip(ctx.run.chunks, ctx.surroundings, strict=True))):
            if done is None:
                with surroundings.restored():
                    done = _Pass.of(ctx.run, chunk, ctx.store)
            backward.propagate(chunk, done, done.hidden, grad[chunk.start : chunk.stop])
            done = None
        return None, *backward.totals


Pair = tuple[Tensor | None, Tensor | None]


def _both(pair: Pair, like: tuple[Tensor, Tensor]) -> Pair:
    """Zeros for the one of two gradients that is missing, such as that of a state which a layer doesn't have."""
    if pair[0] is None and pair[1] is None:
        return pair
    first, second = (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(pair, like, strict=True))
    return first, second


def _leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()


def _gradients(outputs: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    # With adapters, the first keys may depend on nothing that is trained.
    reached = [(o, g) for o, g in outputs if o.requires_grad]
    if not reached:
        return (None,) * len(inputs)
    return torch.autograd.grad([o for o, _ in reached], inputs, [g for _, g in reached], allow_unused=True)


@contextmanager
def _hooks_at_rest(parameters: list[Tensor]) -> Iterator[None]:
    """Hooks on parameters are for whole gradients, which autograd hands them in the end: not for parts of them."""
    hooked = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for p, _ in hooked:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in hooked:
            p._backward_hooks = hooks


def _accumulate(totals: list[Tensor | None], parts: tuple[Tensor | None, ...]) -> None:
    # In place, so that one set of gradients is held beside that of a chunk.
    for i, part in enumerate(parts):
        total = totals[i]
        if part is not None:
            totals[i] = part if total is None else total.add_(part)


class _Surroundings:
    """The random state and the autocast that something was computed in, to compute it again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states = [torch.get_rng_state()]
        if device.type == "cuda":
            self.states.append(torch.cuda.get_rng_state(device))
        self.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def drawn(self) -> bool:
        """Whether random numbers were drawn since."""
        now = _Surroundings(self.device)
        return any(not torch.equal(a, b) for a, b in zip(self.states, now.states, strict=True))

    def restore(self) -> None:
        torch.set_rng_state(self.states[0])
        for state in self.states[1:]:
            torch.cuda.set_rng_state(state, self.device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it random numbers and autocast are as they were."""
        enabled, dtype = self.autocast
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.autocast(self.device.type, dtype, enabled):
            self.restore()
            yield
