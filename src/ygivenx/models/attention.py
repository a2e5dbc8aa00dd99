"""Attention over a forest, registered through transformers' attention interface: no model code is patched.

q attends to k iff k <= q < end[k], and in a layer with a sliding window also depth[q] - depth[k] < window.
Routes, all with the same numbers:
  dense   one masked product; the readable twin of the others
  blocks  blocks of queries, each with the path that leads to it and with itself; the CPU's flash kernel
  flex    FlexAttention; the mask is a function of `end`
  plain   causal attention, where the forest is one sequence
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ConfigError, ModelError, nearest
from ..forest import Ints

PREFIX = (
    "ygivenx_"  # our names in transformers' registry: ygivenx_sdpa is ours for forests, sdpa for the rest
)
ROUTES = ("auto", "dense", "blocks", "flex", "plain")
BLOCK = 128  # queries of a block that holds more than one segment


KeysValues = dict[nn.Module, tuple[Tensor, Tensor]]  # by attention layer, each [1, heads, tokens, D]


@dataclass
class Plan:
    """How one forward pass attends: handed to the model as a keyword argument, read in every layer.

    end, depth: int64 [K], of the nodes that can be seen; the last K - first of them are the queries. Where
    first > 0 the model is fed one chunk of a longer forest, and `past` has the keys and values of the path
    that leads to it. fresh: the chunk's own, put there by the layers if it isn't None. layers: the attention
    layers that asked so far. made: masks and blocks by window.
    """

    end: Ints
    depth: Ints
    route: str
    device: torch.device
    first: int = 0
    past: KeysValues = field(default_factory=dict)
    fresh: KeysValues | None = None
    layers: set[nn.Module] = field(default_factory=set)
    made: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, end: Ints, depth: Ints, device: torch.device, route: str = "auto", first: int = 0) -> Plan:
        if route not in ROUTES:
            raise ConfigError(
                f"unknown route {route!r}{nearest(route, ROUTES)}", fix=f"use one of {', '.join(ROUTES)}"
            )
        plain = not first and bool((end == len(end)).all())
        if route == "plain" and not plain:
            raise ConfigError(
                "the route 'plain' is for one sequence; this forest branches", fix="leave route out"
            )
        if route == "auto":
            route = "plain" if plain else automatic(device)
        return cls(end, depth, route, device, first)

    def join(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values after those of the path."""
        self.layers.add(module)
        if self.fresh is not None:
            self.fresh[module] = key, value
        if not self.first:
            return key, value
        past_key, past_value = self.past[module]
        return torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)

    def once(self, make: Callable[..., Any], window: int | None) -> Any:
        """make(self, window), kept for the layers that ask later."""
        key = make, window
        if key not in self.made:
            self.made[key] = make(self, window)
        return self.made[key]


def automatic(device: torch.device) -> str:
    """The route that branching forests take on a device."""
    return {"cpu": "blocks", "cuda": "flex"}.get(device.type, "dense")


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           ygx: Plan | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What transformers' layers call. query [1, heads, F, D]; returns [1, F, heads, D].

    Without a plan it is what the model would have run anyway.
    """
    if ygx is None:
        return _stock(module)(module, query, key, value, attention_mask, **options)
    # Under autocast the rotary embedding leaves query and key in float32 beside a value in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as torch's own attention does; rotated keys may have stayed wider
        query, key, value = (t.to(torch.get_autocast_dtype(kind)) for t in (query, key, value))
    key, value = ygx.join(module, key, value)
    out = _routed(ygx, query, key, value, _Options.of(query, options))
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Options:
    """What a layer asks for: softmax(softcap(scale·q·k)) with a window, sinks and dropout on its weights."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float

    @classmethod
    def of(cls, query: Tensor, options: dict[str, Any]) -> _Options:
        for name in ("position_bias",):
            if options.get(name) is not None:
                raise ModelError(f"attention with {name} can't be computed over a forest")
        scale = options.get("scaling")
        return cls(
            query.shape[-1] ** -0.5 if scale is None else scale,
            options.get("sliding_window"),
            options.get("softcap"),
            options.get("s_aux"),
            options.get("dropout", 0.0),
        )


def _routed(plan: Plan, query: Tensor, key: Tensor, value: Tensor, o: _Options) -> Tensor:
    """The plan's route, or the twin for what that route has no kernel for."""
    window = o.window if o.window is not None and o.window <= plan.depth.max() else None
    simple = o.softcap is None and o.sinks is None and not o.dropout
    same_width = query.shape[-1] == value.shape[-1]
    if plan.route == "plain" and simple and window is None:
        key, value = _per_head(query, key), _per_head(query, value)
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=o.scale)
    if plan.route == "blocks" and simple and same_width:
        return _Blocks.apply(query, key, value, plan.once(make_tiles, window), o.scale)
    if plan.route == "flex" and o.sinks is None and not o.dropout:
        return _flex(query, key, value, plan.once(flex_mask, window), o)
    return dense(query, key, value, plan.once(dense_mask, window), o)


# -- dense: the twin -------------------------------------------------------------------------------------


def dense_mask(plan: Plan, window: int | None) -> Tensor:
    """bool [K - first, K], true where q (row) attends to k (column)."""
    end, depth = (torch.from_numpy(a).to(plan.device) for a in (plan.end, plan.depth))
    k = torch.arange(len(end), device=plan.device)
    q = k[plan.first :, None]
    allowed = (k <= q) & (q < end)
    return allowed if window is None else allowed & (depth[q] - depth < window)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, o: _Options) -> Tensor:
    key, value = _per_head(query, key), _per_head(query, value)
    if o.softcap is None and o.sinks is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=o.dropout, scale=o.scale
        )
    scores = query @ key.mT * o.scale
    if o.softcap is not None:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if o.sinks is not None:  # one more key per head, with a learned score and no value
        sinks = o.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = torch.softmax(scores.float(), -1).to(value.dtype)[..., : key.shape[2]]
    return nn.functional.dropout(weights, o.dropout) @ value


def _per_head(query: Tensor, kv: Tensor) -> Tensor:
    groups = query.shape[1] // kv.shape[1]
    return kv.repeat_interleave(groups, dim=1) if groups > 1 else kv


# -- blocks: the CPU -------------------------------------------------------------------------------------

Runs = tuple[slice, ...]  # nodes, as runs of neighbours


@dataclass(frozen=True)
class Tile:
    """Queries `rows` that see the nodes `keys`: all of them, those up to their own (`causal`), or those of the mask.

    mask: float [rows, keys], 0 or -inf.
    """

    rows: slice
    keys: Runs
    mask: Tensor | None = None
    causal: bool = False


class Tiles(NamedTuple):
    """near: each query once, with what stands in its own block. far: with the path that leads to whole blocks."""

    near: list[Tile]
    far: list[Tile]


def make_tiles(plan: Plan, window: int | None) -> Tiles:
    """Long segments are blocks of their own, short ones are gathered; with a window all are short.

    Neighbouring blocks that one path leads to, such as the questions after a passage, see it together: the kernel
    does best with many queries there, and with few in a block's own part.
    """
    near, far = list[Tile](), list[Tile]()
    path = np.zeros(0, np.int64)
    for start, stop in _cuts(plan, window):
        before = path
        tile, path = _block(plan, start, stop, window, before)
        near.append(tile)
        if len(path):
            first = far.pop().rows.start if path is before else tile.rows.start
            far.append(Tile(slice(first, tile.rows.stop), _runs(path)))
    return Tiles(near, far)


def _cuts(plan: Plan, window: int | None) -> list[tuple[int, int]]:
    # Neighbours with the same end are a chain without branches: a segment.
    bounds = plan.first + np.flatnonzero(np.diff(plan.end[plan.first :], prepend=-1, append=-1))
    if window is not None:
        bounds = np.unique(np.concatenate((bounds, np.arange(plan.first, len(plan.end), BLOCK))))
    cuts, start = [], plan.first
    for here, after in pairwise(bounds.tolist()):
        if after - start > BLOCK and here > start:
            cuts.append((start, here))
            start = here
    return [*cuts, (start, len(plan.end))]


def _block(plan: Plan, start: int, stop: int, window: int | None, before: Ints) -> tuple[Tile, Ints]:
    """Queries [start, stop) with their near keys, and the path, seen by all of them, that isn't among those.

    It is `before`, the path of the block before, if what it lacks is little.
    """
    end, depth, rows = plan.end, plan.depth, slice(start - plan.first, stop - plan.first)
    keys = np.flatnonzero(end[:start] > start)  # the path from the root to here
    everywhere = end[keys] >= stop
    if window is not None:
        inside = depth[start:stop]
        keys, everywhere = (a[depth[keys] > inside.min() - window] for a in (keys, everywhere))
        everywhere &= depth[keys] > inside.max() - window
    path = keys[everywhere]
    one = bool((end[start:stop] == end[start]).all()) and everywhere.all()
    if one and (window is None or stop - start <= window):
        same = np.array_equal(path, before)
        return Tile(rows, (slice(start, stop),), causal=True), before if same else path
    if len(path) - len(before) <= BLOCK // 2 and np.array_equal(path[: len(before)], before):
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


def _add(total: Tensor, runs: Runs, part: Tensor) -> None:
    for run, piece in zip(runs, part.split([run.stop - run.start for run in runs], 2), strict=True):
        total[:, :, run] += piece


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Blocks(torch.autograd.Function):
    """Softmax over near and far keys by two flash calls, merged by their logsumexp (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, scale: float) -> Tensor:
        n, heads, length, width = query.shape
        out = query.new_empty(n, length, heads, width).transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(n, length, heads, dtype=wide).transpose(1, 2)

        def attended(t: Tile) -> tuple[Tensor, Tensor]:
            q = query[:, :, t.rows]
            return _flash(q, _take(key, t.keys), _take(value, t.keys), 0.0, t.causal,
                          attn_mask=_like(t.mask, q), scale=scale)  # fmt: skip

        for t in tiles.near:
            part, part_lse = attended(t)
            out[:, :, t.rows], lse[:, :, t.rows] = part, part_lse
        for t in tiles.far:
            part, part_lse = attended(t)
            o, total = out[:, :, t.rows], lse[:, :, t.rows]
            torch.logaddexp(total, part_lse, out=total)
            o.lerp_(part, (part_lse - total).exp_()[..., None].to(part.dtype))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With the merged output and logsumexp, each part's gradient is that of its share of the whole.
        query, key, value, out, lse = ctx.saved_tensors
        d_query, d_key, d_value = (_zeros(t) for t in (query, key, value))
        for t in (*ctx.tiles.near, *ctx.tiles.far):
            g, q, o, total = (a[:, :, t.rows] for a in (grad, query, out, lse))
            k, v = _take(key, t.keys), _take(value, t.keys)
            dq, dk, dv = _flash_backward(
                g, q, k, v, o, total, 0.0, t.causal, attn_mask=_like(t.mask, q), scale=ctx.scale
            )
            d_query[:, :, t.rows] += dq
            _add(d_key, t.keys, dk)
            _add(d_value, t.keys, dv)
        return d_query, d_key, d_value, None, None


def _like(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(query.dtype)


def _zeros(like: Tensor) -> Tensor:
    n, heads, length, width = like.shape
    return like.new_zeros(n, length, heads, width).transpose(1, 2)


# -- flex: CUDA ------------------------------------------------------------------------------------------


def flex_mask(plan: Plan, window: int | None) -> BlockMask:
    end, depth = (torch.from_numpy(a).to(plan.device) for a in (plan.end, plan.depth))

    def allowed(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + plan.first
        seen = (k <= q) & (q < end[k])
        return seen if window is None else seen & (depth[q] - depth[k] < window)

    return create_block_mask(allowed, None, None, len(end) - plan.first, len(end), device=plan.device)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, o: _Options) -> Tensor:
    run = _compiled_flex() if query.is_cuda else flex_attention
    score_mod = None if o.softcap is None else _capped(o.softcap)
    gqa = query.shape[1] != key.shape[1]
    return run(query, key, value, score_mod=score_mod, block_mask=mask, scale=o.scale, enable_gqa=gqa)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


# -- transformers' registry ------------------------------------------------------------------------------


def prepare(config: PreTrainedConfig) -> None:
    """Let the layers of a model with this config ask us first; calls without a plan run as before.

    It stays so: gradient checkpointing runs the layers again when we are long gone.
    """
    stock = config._attn_implementation or "eager"
    if stock.startswith(PREFIX):
        return
    name = PREFIX + stock
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
    config._attn_implementation = name


def _stock(module: Any) -> Any:
    name = module.config._attn_implementation.removeprefix(PREFIX)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
