"""Losses that reweight tokens by log p: small functions on top of the selective head.

Each takes what `log_probs` gives, log p float [E] of the edges, and gives new weights (then they are constants of the
step, detached, for `selective_cross_entropy`) or, where gradients have to flow through the weights, the loss itself.

    log_p = log_probs(hidden, weight, rows, targets)
    loss = focal(log_p, weights, gamma=2.0)                          # differentiable
    _, loss = selective_cross_entropy(hidden, weight, rows, targets, dft_weights(log_p, weights))
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError


def dft_weights(log_p: Tensor, weights: Tensor) -> Tensor:
    """w·p with p detached: dynamic fine-tuning, "On the Generalization of SFT" (arXiv 2508.05629), equation 9."""
    return weights * log_p.detach().exp()


def focal(log_p: Tensor, weights: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Σ w·(1 − p)^γ·(−log p): "Focal loss for dense object detection" (arXiv 1708.02002), equation 4.

    Differentiable in log p, through the factor as well. 1 − p is −expm1(log p): exact for confident tokens.
    """
    if gamma < 0:
        raise ConfigError(f"gamma {gamma} is negative", fix="0 is the plain loss; 2 is usual")
    rest = -torch.expm1(log_p.double())
    terms = -log_p.double()
    if gamma:
        # At p = 1 the term is 0, and so is its slope; the power's own slope may be infinite there.
        certain = rest == 0
        terms = torch.where(certain, 0.0, rest.where(~certain, 1.0) ** gamma * terms)
    return (weights.double() * terms).sum().to(log_p.dtype)


def excess_weights(log_p: Tensor, reference_log_p: Tensor, weights: Tensor, *, share: float = 0.6) -> Tensor:
    """Weights of the tokens whose loss exceeds a reference model's the most, 0 for the others.

    "Rho-1: Not all tokens are what you need" (arXiv 2404.07965), equation 4: of the edges with a weight, the `share`
    with the highest (−log p) − (−log p of the reference) stay; at least one does. Ties go to the earlier edge.
    """
    if not 0 < share <= 1:
        raise ConfigError(
            f"share {share} is outside (0, 1]", fix="give the part of the trained tokens to keep"
        )
    trained = weights.nonzero()[:, 0]
    if not len(trained):
        return weights.clone()
    excess = (reference_log_p - log_p).detach()[trained]
    kept = trained[excess.argsort(descending=True, stable=True)[: max(1, round(share * len(trained)))]]
    return torch.zeros_like(weights).index_copy(0, kept, weights[kept])


def smoothed(log_p: Tensor, mean_log_p: Tensor, weights: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Σ w·((1 − ε)·(−log p) + ε·(−mean over the vocabulary of log p)): label smoothing (arXiv 1512.00567, section 7).

    `mean_log_p` [E] is `mean_log_probs` of the same rows. Differentiable in both.
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing {smoothing} is outside [0, 1)", fix="0.1 is usual")
    mixed = (1 - smoothing) * log_p.double() + smoothing * mean_log_p.double()
    return -(weights.double() * mixed).sum().to(log_p.dtype)


def mean_log_probs(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    log_p: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Mean over the vocabulary of log Pr(· | row), float32 [E], without a pass over the vocabulary's logits.

    The mean logit is the logit of the mean token: mean(z) − logsumexp = (mean(z) − z[target]) + log p. So it is
    differentiable through `log_p` and two small products. For heads without a soft-cap, which isn't linear.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows, targets = rows.long(), targets.long()  # `log_probs` takes narrower ones, too
    # mean(z) - z[target] = h·(mean of W - W[target]): one product of H numbers for each edge, whatever V is.
    mean_token = weight.mean(0, dtype=wide)
    step = hidden[rows].to(wide) * (mean_token - weight[targets].to(wide))
    distance = step.sum(-1)
    if bias is not None:
        distance = distance + bias.mean(dtype=wide) - bias[targets].to(wide)
    return log_p + scale * distance
