"""The readable twin of `selective.py`: whole logits in float64 and torch's own autograd. The oracle of its tests."""

from __future__ import annotations

import torch
from torch import Tensor


def all_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """float64 [F, V]: z = scale·(h·Wᵀ + b), then softcap·tanh(z / softcap)."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def selective_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(log p [E], Σ w·(−log p + z_loss·logsumexp²)), both float64 and differentiable."""
    z = all_logits(hidden, weight, bias=bias, softcap=softcap, scale=scale)[rows]
    lse = torch.logsumexp(z, dim=-1)
    log_p = z.gather(1, targets[:, None])[:, 0] - lse
    return log_p, (weights.double() * (z_loss * lse**2 - log_p)).sum()


def ranks(z: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """int64 [E]: how many tokens of the vocabulary have a higher logit than the target."""
    z = z[rows]
    return (z > z.gather(1, targets[:, None])).sum(-1)
