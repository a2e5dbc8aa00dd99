"""Attention over a forest, registered through transformers' attention interface: no model code is patched.

q attends to k iff k <= q < end[k], and in a layer with a sliding window also depth[q] - depth[k] < window.
Routes, all with the same numbers:
  dense   one masked product; the readable twin of the others
  blocks  blocks of queries, each with the path that leads to it and with itself; the CPU's flash kernel
  flex    FlexAttention; the mask is a function of `end`
  varlen  causal attention on sequences of several lengths, where none of them begin alike
  plain   causal attention, where the forest is one sequence
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nested import nested_tensor_from_jagged
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ModelError
from .blockwise_attention import Blocks, make_tiles
from .flex import flex, flex_mask, has_kernel
from .plan import CHAINS, Plan, automatic

# Our names in transformers' registry: ygivenx_sdpa is ours for forests, and transformers' sdpa for the rest.
PREFIX = "ygivenx_"


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           ygx: Plan | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What transformers' layers call. query [1, heads, F, D]; returns [1, F, heads, D].

    Without a plan it is what the model would have run anyway.
    """
    if ygx is None:
        stock: tuple[Tensor, Tensor | None] = _stock(module)(
            module, query, key, value, attention_mask, **options
        )
        return stock
    # Under autocast the rotary embedding leaves query and key in float32 beside a value in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as torch's own attention does; rotated keys may have stayed wider
        query, key, value = (t.to(torch.get_autocast_dtype(kind)) for t in (query, key, value))
    if "sliding_window" not in options and (window := _window_in_mask(module)):
        ygx.window_in_mask = options["sliding_window"] = window
    key, value = ygx.join(module, key, value)
    out = _routed(ygx, query, key, value, _Options.of(module, query, options))
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Options:
    """What a layer asks for: softmax(softcap(scale·q·k)) with a window, sinks and dropout on its weights.

    chunk: tokens see only those whose position falls into the same chunk of so many.
    """

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float
    chunk: int | None = None

    @classmethod
    def of(cls, module: nn.Module, query: Tensor, options: dict[str, Any]) -> _Options:
        if options.get("position_bias") is not None:
            raise ModelError("attention with position_bias can't be computed over a forest")
        scale = options.get("scaling")
        return cls(
            query.shape[-1] ** -0.5 if scale is None else scale,
            options.get("sliding_window"),
            options.get("softcap"),
            options.get("s_aux"),
            options.get("dropout", 0.0),
            _chunk_of(module),
        )


def _kind_of(module: Any) -> str | None:
    """A layer's type by its config; None where that doesn't tell layers apart."""
    config = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    return None if kinds is None or layer is None else kinds[layer]


def _window_in_mask(module: Any) -> int | None:
    """The sliding window that a layer leaves to the model's own mask, which isn't made over a forest.

    Whether that mask really has it is found out by the comparison of `sharing`.
    """
    slides = _kind_of(module) in (None, "sliding_attention")
    return getattr(getattr(module, "config", None), "sliding_window", None) if slides else None


def _chunk_of(module: Any) -> int | None:
    return module.config.attention_chunk_size if _kind_of(module) == "chunked_attention" else None


def _routed(plan: Plan, query: Tensor, key: Tensor, value: Tensor, o: _Options) -> Tensor:
    """The plan's route, or the twin, dense, for what that route has no kernel for.

    | route | has no kernel for |
    |---|---|
    | plain, varlen | windows, soft-caps, sinks, dropout: the forest's automatic route is asked instead |
    | varlen | values of another width than queries |
    | blocks | soft-caps, sinks, dropout, values of another width |
    | flex | sinks, dropout, heads or forests that are too small |
    | all but dense | chunks |
    """
    deepest = plan.depth.max()
    if o.chunk is not None and o.chunk <= deepest:
        return dense(query, key, value, plan.cached(chunked_mask, o.chunk), o)
    # A window or a chunk that no path reaches is none, and spares the masks that it would need.
    window = o.window if o.window is not None and o.window <= deepest else None
    simple = o.softcap is None and o.sinks is None and not o.dropout
    same_width = query.shape[-1] == value.shape[-1]
    route = plan.route
    if (route in CHAINS and not (simple and window is None)) or (route == "varlen" and not same_width):
        route = automatic(plan.device)
    if route == "plain":
        return plain(query, key, value, o.scale)
    if route == "varlen":
        return varlen(query, key, value, plan.cached(varlen_cuts, None), o.scale)
    if route == "blocks" and simple and same_width:
        tiles = plan.cached(make_tiles, window)
        together: Tensor = Blocks.apply(query, key, value, tiles, o.scale)  # type: ignore[no-untyped-call]
        return together
    if route == "flex" and o.sinks is None and not o.dropout and has_kernel(query, value):
        return flex(query, key, value, plan.cached(flex_mask, window), o.scale, o.softcap)
    return dense(query, key, value, plan.cached(dense_mask, window), o)


# -- dense: the twin -------------------------------------------------------------------------------------


def dense_mask(plan: Plan, window: int | None) -> Tensor:
    """bool [K - first, K], true where q (row) attends to k (column)."""
    end, depth = (torch.from_numpy(a).to(plan.device) for a in (plan.end, plan.depth))
    k = torch.arange(len(end), device=plan.device)
    q = k[plan.first :, None]
    allowed = (k <= q) & (q < end)
    return allowed if window is None else allowed & (depth[q] - depth < window)


def chunked_mask(plan: Plan, chunk: int | None) -> Tensor:
    """`dense_mask` where q and k are also in the same chunk of `chunk` positions."""
    assert chunk is not None
    number = torch.from_numpy(plan.depth // chunk).to(plan.device)
    return dense_mask(plan, None) & (number[plan.first :, None] == number)


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


# -- plain and varlen: sequences that share nothing ------------------------------------------------------


class Cuts(NamedTuple):
    """Where sequences begin and the last one ends: int64 [sequences + 1], and how long the shortest and longest are."""

    offsets: Tensor
    least: int
    most: int


def varlen_cuts(plan: Plan, _window: int | None) -> Cuts:
    lengths = np.diff(plan.bounds)
    return Cuts(torch.from_numpy(plan.bounds).to(plan.device), int(lengths.min()), int(lengths.max()))


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One sequence."""
    key, value = _per_head(query, key), _per_head(query, value)
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, scale: float, causal: bool = True
) -> Tensor:
    """All sequences in one kernel of torch's for jagged tensors (variable-length flash attention); on a CPU in turns.

    causal is False only in the test of what surrounds the kernel: without a GPU torch has none that is causal.
    """
    if causal and not query.is_cuda:
        parts = (t.split(cuts.offsets.diff().tolist(), 2) for t in (query, key, value))
        return torch.cat([plain(q, k, v, scale) for q, k, v in zip(*parts, strict=True)], 2)

    def jagged(t: Tensor) -> Tensor:
        tokens, lengths = t[0].transpose(0, 1).contiguous(), (cuts.least, cuts.most)
        return nested_tensor_from_jagged(tokens, cuts.offsets, None, 1, *lengths).transpose(1, 2)

    key, value = _per_head(query, key), _per_head(query, value)
    out = scaled_dot_product_attention(
        jagged(query), jagged(key), jagged(value), is_causal=causal, scale=scale
    )
    return out.transpose(1, 2).values().transpose(0, 1)[None]


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
