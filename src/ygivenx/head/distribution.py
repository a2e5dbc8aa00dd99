"""The most probable tokens of a distribution over the vocabulary, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .logit_head import LogitHead

MEMORY = 64 << 20  # bytes of float32 logits that are held at a time


@torch.no_grad()
def most_probable(hidden: Tensor, head: LogitHead, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids int64 [E, k], log_p float32 [E, k]) of what row rows[e] of hidden [F, H] predicts, the highest first.

    k: at most the size of the vocabulary.
    """
    unique, edge = rows.unique(return_inverse=True)
    size = max(1, MEMORY // (4 * len(head.weight)))
    log_p = (_logits(hidden[part], head).log_softmax(1) for part in unique.split(size))
    parts = [p.topk(min(k, p.shape[1])) for p in log_p]
    return torch.cat([p.indices for p in parts])[edge], torch.cat([p.values for p in parts])[edge]


def _logits(hidden: Tensor, head: LogitHead) -> Tensor:
    """float32 [n, V]; products run in the head's own precision, as the model's do."""
    product = (hidden.to(head.weight.dtype) @ head.weight.T).float()
    if head.bias is not None:
        product += head.bias
    return head.from_product(product)[0]
