"""Attention over a forest, registered through transformers' attention interface: no model code is patched.

q attends to k iff k <= q < end[k], and in a layer with a sliding window also depth[q] - depth[k] < window.
Every route gives the same numbers; "dense", one masked product, is the readable twin of the others.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = (
    "ygivenx_"  # our names in transformers' registry: ygivenx_sdpa is ours for forests, sdpa for the rest
)


@dataclass
class Plan:
    """How one forward pass attends: handed to the model as a keyword argument, read in every layer.

    end, depth: int64 [F] on the model's device. calls: layers that asked so far.
    """

    end: Tensor
    depth: Tensor
    route: str
    calls: int = 0
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """bool [F, F], true where q (row) attends to k (column)."""
        if window not in self.masks:
            q = torch.arange(len(self.end), device=self.end.device)[:, None]
            k = q.T
            allowed = (k <= q) & (q < self.end)
            if window is not None:
                allowed &= self.depth[:, None] - self.depth < window
            self.masks[window] = allowed
        return self.masks[window]


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           ygx: Plan | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The function that transformers' layers call. Without a plan, what the model would have run anyway."""
    if ygx is None:
        return _stock(module)(module, query, key, value, attention_mask, **options)
    ygx.calls += 1
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    out = _dense(query, key, value, ygx.mask(options.get("sliding_window")), scale)
    return out.transpose(1, 2).contiguous(), None


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def prepare(config: PreTrainedConfig) -> None:
    """Let the layers of a model with this config ask us first. Calls without a plan run as before."""
    stock = config._attn_implementation or "eager"
    if stock.startswith(PREFIX):
        return
    name = PREFIX + stock
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
    config._attn_implementation = name


def _stock(module: nn.Module) -> Any:
    name = module.config._attn_implementation.removeprefix(PREFIX)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def explain(model: nn.Module | None = None) -> dict[str, str]:
    """Which route runs on which device."""
    return {"cpu": "dense", "cuda": "dense"}
