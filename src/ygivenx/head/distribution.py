"""What a distribution over the vocabulary is like: entropy, ranks and the most probable tokens, without gradients.

Rows come a few at a time, so that no [rows, vocabulary] tensor beyond `MEMORY` bytes exists. Sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .logit_head import LogitHead

MEMORY = 64 << 20  # bytes of logits that are held at a time


class Wants(NamedTuple):
    """What is asked for beside log p."""

    entropy: bool = False
    ranks: bool = False
    top_k: int = 0

    def __bool__(self) -> bool:
        return self.entropy or self.ranks or self.top_k > 0


class Description(NamedTuple):
    """By edge: entropy float32 [E], in nats; rank int64 [E]; top_ids int64, top_log_p float32 [E, k]."""

    entropy: Tensor | None = None
    rank: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_p: Tensor | None = None


@torch.no_grad()
def describe(hidden: Tensor, head: LogitHead, rows: Tensor, targets: Tensor, wants: Wants) -> Description:
    """Of the distribution that row rows[e] predicts, by edge e. hidden [F, H]; rows, targets int64 [E]."""
    order = rows.argsort(stable=True)
    unique, counts = rows[order].unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    # 4 bytes for each logit, which are float32.
    size = max(1, MEMORY // (4 * len(head.weight)))
    parts = []
    for a in range(0, len(unique), size):
        b = min(a + size, len(unique))
        column = torch.arange(b - a, device=rows.device).repeat_interleave(counts[a:b])
        z = _logits(hidden[unique[a:b]], head)
        parts.append(_described(z, column, targets[order[ends[a] : ends[b]]], wants))
    place = order.argsort()
    return Description(
        *(None if by_part[0] is None else torch.cat(by_part)[place] for by_part in zip(*parts, strict=True))
    )


def _logits(hidden: Tensor, head: LogitHead) -> Tensor:
    """float32 [n, V]; products run in the head's own precision, as the model's do."""
    product = (hidden.to(head.weight.dtype) @ head.weight.T).float()
    if head.bias is not None:
        product += head.bias
    return head.from_product(product)[0]


def _described(z: Tensor, column: Tensor, targets: Tensor, wants: Wants) -> Description:
    """Of logits z [n, V], by edge: column[e] is the row of z that predicts targets[e]."""
    rank = (z[column] > z[column, targets][:, None]).sum(1) if wants.ranks else None
    log_p = z - z.logsumexp(1, keepdim=True)
    entropy = -(log_p.exp() * log_p).nansum(1)[column] if wants.entropy else None  # 0·log 0 counts as 0
    if not wants.top_k:
        return Description(entropy, rank)
    top = log_p.topk(min(wants.top_k, z.shape[1]))
    return Description(entropy, rank, top.indices[column], top.values[column])
