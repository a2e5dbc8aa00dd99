"""Recurrences of layers that can't begin in a state: all nodes of one depth of a forest are one step.

Written beside the families whose layers hold these parts under these names; the parts without a recurrence are theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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


class Depths(NamedTuple):
    """The nodes of a forest by depth.

    order: int64 [N], the nodes. counts: how many each depth has. parents: of each depth but the first, int64 [n], where
    among those of the depth before each one's parent is. place: int64 [N], where in `order` each node is. ancestors:
    int64 [N, kernel], from kernel - 1 steps above each node down to itself; N where there is none. depth: int64 [N].
    """

    order: Tensor
    counts: list[int]
    parents: list[Tensor]
    place: Tensor
    ancestors: Tensor
    depth: Tensor


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
        put(order), counts.tolist(), list(map(put, parents)), put(place), put(np.stack(ancestors, 1)), put(plan.depth)
    )  # fmt: skip


def over_forest(mixer: Any, hidden: Tensor, plan: Plan) -> Any:
    """The layer's output [1, N, H] for hidden [1, N, H], in a pair where the layer gives one."""
    layer = LAYERS[type(mixer).__name__]
    kernel = getattr(mixer, layer.kernel) if isinstance(layer.kernel, str) else layer.kernel
    out = layer.forward(mixer, hidden[0], plan.cached(depths, kernel))[None]
    return (out, None) if layer.gives_pair else out


def scan(step: Callable[..., Tensor], tree: Depths, *inputs: Tensor) -> Tensor:
    """state[v] = step(state of v's parent, or None at roots, *inputs[v]); all [N, ...]."""
    by_depth = zip(*(t.index_select(0, tree.order).split(tree.counts) for t in inputs), strict=True)
    found = [step(None, *next(by_depth))]
    for parents, here in zip(tree.parents, by_depth, strict=True):
        found.append(step(found[-1].index_select(0, parents), *here))
    return torch.cat(found).index_select(0, tree.place)


def _linear(state: Tensor | None, decay: Tensor, update: Tensor) -> Tensor:
    return update if state is None else decay * state + update


def _seen(x: Tensor, tree: Depths) -> Tensor:
    """What a convolution sees at each node, zeros above roots: [N, kernel, channels]."""
    return torch.cat((x, torch.zeros_like(x[:1])))[tree.ancestors]


def _convolved(conv: nn.Conv1d, x: Tensor, tree: Depths) -> Tensor:
    """The causal convolution of each channel along the path of each node, [N, channels]."""
    out = torch.einsum("nkc,ck->nc", _seen(x, tree), conv.weight[:, 0].to(x.dtype))
    return out if conv.bias is None else out + conv.bias.to(x.dtype)


# -- Mamba, and Zamba with several heads of it ---------------------------------------------------------------

NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")  # where a family has them


def _mamba(mixer: Any, hidden: Tensor, tree: Depths) -> Any:
    x, gate = mixer.in_proj(hidden).chunk(2, -1)
    x = mixer.act(_convolved(mixer.conv1d, x, tree))
    parts = zip(NORMS, _split(mixer, mixer.x_proj(x)), strict=True)
    step, B, C = (getattr(mixer, norm, nn.Identity())(part) for norm, part in parts)
    step = linear(step, mixer.dt_proj.weight).float() + mixer.dt_proj.bias.float()
    y = _selective(mixer, tree, x, step, B, C) * silu(gate)
    return mixer.out_proj(y.to(hidden.dtype))


def _zamba(mixer: Any, hidden: Tensor, tree: Depths) -> Any:
    x, gate = mixer.in_proj(hidden).unflatten(-1, (-1, 2)).unbind(-1)  # they alternate, channel by channel
    heads = (mixer.n_mamba_heads, mixer.mamba_head_dim)
    x = mixer.act(_convolved(mixer.conv1d, x, tree)).unflatten(-1, heads)
    step, B, C = _split(mixer, torch.einsum("nhd,hpd->nhp", x, mixer.x_proj_weight))
    step = torch.einsum("nhp,hdp->nhd", step, mixer.dt_proj_weight).float() + mixer.dt_proj_bias.float()
    y = _selective(mixer, tree, x, step, B, C).flatten(1) * silu(gate)
    return mixer.out_proj(y.to(hidden.dtype))


def _split(mixer: Any, parameters: Tensor) -> Any:
    return parameters.split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], -1)


def _selective(mixer: Any, tree: Depths, x: Tensor, step: Tensor, B: Tensor, C: Tensor) -> Any:
    """The selective scan of x and step before softplus, [N, ..., D], with B and C, [N, ..., S]."""
    step = softplus(step)
    decay = torch.exp(step[..., None] * -torch.exp(mixer.A_log.float()))
    update = (step * x.float())[..., None] * B.float()[..., None, :]
    states = scan(_linear, tree, decay, update).to(x.dtype)
    return (states @ C[..., None])[..., 0] + x * mixer.D.float()


# -- RecurrentGemma: RG-LRU ----------------------------------------------------------------------------------


def _rg_lru(mixer: Any, hidden: Tensor, tree: Depths) -> Any:
    unit = copy.copy(mixer.rg_lru)  # with the same parameters, and a recurrence and a state of its own
    unit._rnn_scan = partial(_rnn_scan, tree)
    # The layer calls its convolution, so that an adapter on it counts; Mamba's read its weight alone, and so do we.
    x = mixer.conv_1d(_seen(mixer.linear_x(hidden), tree).mT)[..., mixer.conv1d_width - 1]
    return mixer.linear_out(unit(x[None], tree.depth[None])[0] * mixer.act_fn(mixer.linear_y(hidden)))


def _rnn_scan(tree: Depths, hidden_states: Tensor, recurrent_gate: Tensor, **_: Any) -> tuple[Tensor, None]:
    states = scan(_linear, tree, recurrent_gate[0].float(), hidden_states[0].float())
    return states.to(hidden_states.dtype)[None], None


# -- RWKV: both of a block's parts read the node above, too --------------------------------------------------


def _rwkv_attention(mixer: Any, hidden: Tensor, tree: Depths) -> Any:
    key, value, receptance = _mixed(mixer, hidden, tree, "key", "value", "receptance")
    decay, key, value = -torch.exp(mixer.time_decay), key.float(), value.float()
    states = scan(partial(_weighted, decay), tree, key, value)
    before = torch.cat((states, states.new_tensor([0, 0, -1e38]).expand_as(states[:1])))[tree.ancestors[:, 0]]
    total, weight, _ = _weighted(torch.zeros_like(decay), before, key + mixer.time_first, value).unbind(-1)
    return mixer.output(receptance.sigmoid() * (total / weight).to(hidden.dtype))


def _weighted(decay: Tensor, state: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
    """One step of a mean of values that weigh exp(key): their sum and that of weights, over e^m, and m; [n, H, 3]."""
    if state is None:
        return torch.stack((value, torch.ones_like(value), key), -1)
    total, weight, most = state.unbind(-1)
    top = torch.maximum(most + decay, key)
    old, new = torch.exp(most + decay - top), torch.exp(key - top)
    return torch.stack((old * total + new * value, old * weight + new, top), -1)


def _rwkv_feed_forward(mixer: Any, hidden: Tensor, tree: Depths) -> Any:
    key, receptance = _mixed(mixer, hidden, tree, "key", "receptance")
    return receptance.sigmoid() * mixer.value(key.relu().square())


def _mixed(mixer: Any, hidden: Tensor, tree: Depths, *names: str) -> Iterator[Tensor]:
    """Projections of each node's hidden states mixed with those of the node above."""
    above = _seen(hidden, tree)[:, 0]
    for name in names:
        share = getattr(mixer, f"time_mix_{name}")[0]
        yield getattr(mixer, name)(hidden * share + above * (1 - share))


class Layer(NamedTuple):
    """How a class of layers is computed.

    forward(layer, hidden [N, H], tree): its output [N, H]. kernel: its attribute with the steps that its convolution
    sees, or their number. gives_pair: whether it gives a pair, of which the first is read.
    """

    forward: Callable[[Any, Tensor, Depths], Any]
    kernel: str | int = "conv_kernel_size"
    gives_pair: bool = False


LAYERS = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), Layer(_mamba)),
    "ZambaMambaMixer": Layer(_zamba),
    "RecurrentGemmaRecurrentBlock": Layer(_rg_lru, "conv1d_width", True),
    "RwkvSelfAttention": Layer(_rwkv_attention, 2, True),
    "RwkvFeedForward": Layer(_rwkv_feed_forward, 2, True),
}


# -- where blocks don't pass the plan on ---------------------------------------------------------------------


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
