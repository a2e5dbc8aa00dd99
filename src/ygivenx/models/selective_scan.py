"""Mamba's first selective scan over a forest: its layers begin with no state, so all nodes of one depth are one step.

Written beside the families whose layers hold the same parts under the same names: Mamba, Falcon Mamba and Jamba.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

from .plan import Plan
from .segments import segments

# Their blocks don't pass keyword arguments on, so the plan of a call is found here.
current_plan: ContextVar[Plan | None] = ContextVar("current_plan", default=None)


NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")  # where a family has them


class Depths(NamedTuple):
    """The nodes of a forest by depth.

    order: int64 [N], the nodes. counts: how many each depth has. parents: of each depth but the first, int64 [n], where
    among those of the depth before each one's parent is. place: int64 [N], where in `order` each node is. ancestors:
    int64 [N, kernel], from kernel - 1 steps above each node down to itself; N where there is none.
    """

    order: Tensor
    counts: list[int]
    parents: list[Tensor]
    place: Tensor
    ancestors: Tensor


def depths(plan: Plan, kernel: int | None) -> Depths:
    """How a recurrence, and a convolution of `kernel` steps, go through the nodes of a whole forest."""
    tree, count = segments(plan.end), len(plan.end)
    parent = np.arange(-1, count - 1)
    parent[tree.start] = np.where(tree.above < 0, count, tree.above)
    order = np.argsort(plan.depth, kind="stable")
    place, counts = np.argsort(order), np.unique(plan.depth, return_counts=True)[1]
    first = np.cumsum(counts) - counts
    by_depth = np.split(order, first[1:])
    parents = [place[parent[nodes]] - first[i] for i, nodes in enumerate(by_depth[1:])]
    up, ancestors = np.append(parent, count), [np.arange(count)]
    for _ in range((kernel or 1) - 1):
        ancestors.insert(0, up[ancestors[0]])

    def put(a: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(plan.device)

    return Depths(
        put(order), counts.tolist(), list(map(put, parents)), put(place), put(np.stack(ancestors, 1))
    )


def over_forest(mixer: Any, hidden: Tensor, plan: Plan) -> Tensor:
    """The layer's output [1, N, H] for hidden [1, N, H]."""
    tree = plan.cached(depths, mixer.conv_kernel_size)
    x, gate = mixer.in_proj(hidden[0]).chunk(2, -1)
    x = mixer.act(_convolved(mixer.conv1d, x, tree.ancestors))
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    parts = zip(NORMS, mixer.x_proj(x).split(sizes, -1), strict=True)
    step, B, C = (getattr(mixer, norm, nn.Identity())(part) for norm, part in parts)
    step = softplus(linear(step, mixer.dt_proj.weight).float() + mixer.dt_proj.bias.float())
    decay = torch.exp(step[..., None] * -torch.exp(mixer.A_log.float()))
    update = (step * x.float())[..., None] * B.float()[:, None]
    states = scan(decay, update, tree).to(x.dtype)
    y = (states @ C[..., None])[..., 0] + x * mixer.D.float()
    out: Tensor = mixer.out_proj((y * silu(gate)).to(hidden.dtype))
    return out[None]


def _convolved(conv: nn.Conv1d, x: Tensor, ancestors: Tensor) -> Tensor:
    """The causal convolution of each channel along the path of each node, [N, channels]."""
    seen = torch.cat((x, x.new_zeros(1, x.shape[-1])))[ancestors]
    out = torch.einsum("nkc,ck->nc", seen, conv.weight[:, 0].to(x.dtype))
    return out if conv.bias is None else out + conv.bias.to(x.dtype)


def scan(decay: Tensor, update: Tensor, tree: Depths) -> Tensor:
    """state[v] = decay[v] * state[parent of v] + update[v], with 0 above roots; all [N, ...]."""
    decays, updates = (t.index_select(0, tree.order).split(tree.counts) for t in (decay, update))
    found = [updates[0]]
    for a, u, parents in zip(decays[1:], updates[1:], tree.parents, strict=True):
        found.append(a * found[-1].index_select(0, parents) + u)
    return torch.cat(found).index_select(0, tree.place)


@contextmanager
def carried(decoder: nn.Module, plan: Plan) -> Iterator[None]:
    """Within it, and whenever gradient checkpointing runs a layer again, the plan is `current_plan`."""
    checkpointed: list[Any] = [m for m in decoder.modules() if "_gradient_checkpointing_func" in m.__dict__]
    stock = [m.__dict__["_gradient_checkpointing_func"] for m in checkpointed]
    for module, function in zip(checkpointed, stock, strict=True):
        module._gradient_checkpointing_func = partial(_checkpointed, function, plan)
    try:
        with _current(plan):
            yield
    finally:
        for module, function in zip(checkpointed, stock, strict=True):
            module._gradient_checkpointing_func = function


def _checkpointed(function: Any, plan: Plan, forward: Any, *args: Any) -> Any:
    def with_plan(*given: Any) -> Any:
        with _current(plan):
            return forward(*given)

    return function(with_plan, *args)


@contextmanager
def _current(plan: Plan) -> Iterator[None]:
    token = current_plan.set(plan)
    try:
        yield
    finally:
        current_plan.reset(token)
