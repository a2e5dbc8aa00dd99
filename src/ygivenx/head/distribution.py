"""Of a distribution over the vocabulary: its most probable tokens, and the mass of some; without gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .logit_head import LogitHead

MEMORY = 64 << 20  # bytes of float32 logits that are held at a time


@torch.no_grad()
def most_probable(hidden: Tensor, head: LogitHead, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids int64 [E, k], log_p float32 [E, k]) of what row rows[e] of hidden [F, H] predicts, the highest first.

    k: at most the size of the vocabulary.
    """
    edge, log_p = _distributions(hidden, head, rows)
    parts = [p.topk(min(k, p.shape[1])) for p in log_p]
    return torch.cat([p.indices for p in parts])[edge], torch.cat([p.values for p in parts])[edge]


@torch.no_grad()
def log_mass(hidden: Tensor, head: LogitHead, rows: Tensor, tokens: Tensor) -> Tensor:
    """log Σ Pr(v | row rows[e]) over the tokens v, float32 [E]. tokens: int64 [k]."""
    edge, log_p = _distributions(hidden, head, rows)
    return torch.cat([p[:, tokens].logsumexp(1) for p in log_p])[edge]


def _distributions(hidden: Tensor, head: LogitHead, rows: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
    """(which distribution each edge has, int64 [E]; log p float32 [n, V] of some distinct rows after the other)."""
    unique, edge = rows.unique(return_inverse=True)
    size = max(1, MEMORY // (4 * len(head.weight)))
    return edge, (_logits(hidden[part], head).log_softmax(1) for part in unique.split(size))


def _logits(hidden: Tensor, head: LogitHead) -> Tensor:
    """float32 [n, V]; products run in the head's own precision, as the model's do."""
    product = (hidden.to(head.weight.dtype) @ head.weight.T).float()
    if head.bias is not None:
        product += head.bias
    return head.from_product(product)[0]
