"""MiniMax's lightning attention from a state on: the layer itself takes one for a single token only.

Each head's state decays by a factor of its own per token, without regard to what the token says:
state[t] = decay * state[t - 1] + key[t]' value[t], output[t] = query[t] state[t].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LAYER = "MiniMaxLightningAttention"


def attended(layer: Any, hidden: Tensor, cache: Any = None) -> Tensor:
    """The layer's output [B, T, H] for hidden [B, T, H].

    cache: the states [B, heads, D, D] that the rows begin in, and where those go that they end in after as many tokens
    as its group's `lengths` say; without one they begin in 0.
    """
    heads = layer.act_fn(layer.qkv_proj(hidden)).unflatten(-1, (layer.num_attention_heads, -1))
    query, key, value = heads.transpose(1, 2).chunk(3, -1)
    state = None if cache is None else cache.get_recurrent_state(layer.layer_idx)
    if state is None:
        state = value.new_zeros(*value.shape[:2], layer.head_dim, layer.head_dim)
    lengths = (
        hidden.new_full(hidden.shape[:1], hidden.shape[1], dtype=torch.int64)
        if cache is None
        else cache.group.lengths
    )
    found, size = list[Tensor](), layer.block_size
    for block, (q, k, v) in enumerate(zip(*(t.split(size, 2) for t in (query, key, value)), strict=True)):
        count = q.shape[2]
        within = (q @ k.mT * layer.diagonal_decay[:, :, :count, :count]) @ v
        found.append(within + (q * layer.query_decay[:, :count]) @ state)
        state = _after(layer, state, k, v, (lengths - block * size).clamp(0, count))
    if cache is not None:
        cache.update_recurrent_state(state, layer.layer_idx)
    out = layer.norm(torch.cat(found, 2).transpose(1, 2).flatten(2))
    output: Tensor = layer.out_proj(torch.sigmoid(layer.output_gate(hidden)) * out)
    return output


def _after(layer: Any, state: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """The state [B, heads, D, D] after the first tokens of a block, as many as lengths, int64 [B], say."""
    place = torch.arange(key.shape[2], device=key.device)
    # The layer's factors are of a whole block: of a shorter one the last count.
    decay = layer.key_decay[:, (layer.block_size - lengths[:, None] + place).clamp(max=layer.block_size - 1)]
    decay = (decay * (place < lengths[:, None])[..., None]).transpose(0, 1)
    kept = torch.exp(-layer.slope_rate * lengths[:, None, None, None])
    after: Tensor = kept * state + (key * decay).mT @ value
    return after


@contextmanager
def unrounded(decoder: nn.Module) -> Iterator[None]:
    """Within it the factors of its layers are in float32, as for a comparison with the layer's own way.

    In half precision they are rounded: a factor of several tokens isn't the product of those of each, and the layer's
    own numbers depend on where its blocks begin.
    """
    layers: list[Any] = [m for m in decoder.modules() if type(m).__name__ == LAYER]
    kept = [dict(layer.named_buffers(recurse=False)) for layer in layers]
    try:
        for layer in layers:
            slope = layer.get_slope_rate(layer.slope_rate.device)
            layer.slope_rate = slope
            layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(slope)
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)
