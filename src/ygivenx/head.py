"""The selective head: log p and gradients for the tokens that a loss or a score needs, and for no other.

Rows of hidden states that carry no edge never meet the head, and there is no [tokens, vocabulary] tensor beyond
one chunk. The readable twin is `head_reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import ModelError

CHUNK_BYTES = 32 << 20  # logits of one chunk


class Ranked(NamedTuple):
    """log_p float32 [E]; rank int64 [E]: tokens with a higher logit than the target, 0 = greedy."""

    log_p: Tensor
    rank: Tensor


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
    """(log p per edge, Σ w·(−log p + z_loss·logsumexp²)) in one sweep over the rows that carry an edge.

    hidden [F, H] and weight [V, H] float32, bfloat16 or float16; rows, targets int64 [E]: edge e asks row
    rows[e] for token targets[e], in any order, repeats allowed; weights float [E].
    Logits are z = scale·(h·Wᵀ + bias), then softcap·tanh(z / softcap).

    log_p float32 [E] is detached: for a loss whose weights depend on log p, use `log_probs`. The sum is a
    float32 scalar, differentiable in hidden, weight and bias; the gradients are made in the forward sweep.
    Raises ModelError for shapes or indices that don't fit.
    """
    head = _Head(weight, bias, softcap, scale, z_loss)
    _check(hidden, head, rows, targets, weights)
    return _Loss.apply(hidden, weight, bias, rows, targets, weights, head)


@overload
def log_probs(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
    softcap: float | None = ..., scale: float = ..., ranks: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def log_probs(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
    softcap: float | None = ..., scale: float = ..., ranks: Literal[True],
) -> Ranked: ...  # fmt: skip
def log_probs(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ranks: bool = False,
) -> Tensor | Ranked:
    """log Pr(targets[e] | row rows[e]), float32 [E]; with `ranks` also how many tokens are more probable.

    Differentiable like any torch function, once: backward recomputes the chunks, so nothing of size
    [tokens, vocabulary] is kept. Under torch.no_grad() no gradient is prepared. Arguments as in
    `selective_cross_entropy`.
    """
    head = _Head(weight, bias, softcap, scale)
    _check(hidden, head, rows, targets)
    if ranks:
        swept = _sweep(hidden.detach(), head, rows, targets, ranks=True)
        assert swept.rank is not None
        return Ranked(swept.log_p, swept.rank)
    return _LogProbs.apply(hidden, weight, bias, rows, targets, head)


def explain() -> dict[str, str]:
    """Which route would run on this machine, and why."""
    return {"cpu": "torch, in chunks", "cuda": "torch, in chunks"}


@dataclass(frozen=True)
class _Head:
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    z_loss: float = 0.0


@dataclass
class _Swept:
    log_p: Tensor
    loss: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    rank: Tensor | None = None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                weights: Tensor, head: _Head) -> tuple[Tensor, Tensor]:  # fmt: skip
        wants = ctx.needs_input_grad[:3]
        swept = _sweep(hidden, head, rows, targets, weights, wants)
        if any(wants):
            ctx.save_for_backward(hidden, weight, bias, rows, targets, weights)
            ctx.head, ctx.made = head, swept
        ctx.mark_non_differentiable(swept.log_p)
        return swept.log_p, swept.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        made, ctx.made = ctx.made, None
        if made is None:  # a second backward: the first one gave the buffers away
            hidden, weight, bias, rows, targets, weights = ctx.saved_tensors
            head = _Head(weight, bias, ctx.head.softcap, ctx.head.scale, ctx.head.z_loss)
            made = _sweep(hidden, head, rows, targets, weights, ctx.needs_input_grad[:3])
        grads = (made.hidden, made.weight, made.bias)
        if grad.device.type != "cpu" or grad.item() != 1:
            for g in grads:
                if g is not None:
                    g.mul_(grad)
        return (*grads, None, None, None, None)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                head: _Head) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, rows, targets)
        ctx.head = head
        return _sweep(hidden, head, rows, targets).log_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, rows, targets = ctx.saved_tensors
        head = _Head(weight, bias, ctx.head.softcap, ctx.head.scale)
        swept = _sweep(hidden, head, rows, targets, -grad, ctx.needs_input_grad[:3])
        return swept.hidden, swept.weight, swept.bias, None, None, None


def _sweep(
    hidden: Tensor,
    head: _Head,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    wants: tuple[bool, ...] = (False, False, False),
    *,
    ranks: bool = False,
) -> _Swept:
    """One pass over the rows that carry an edge: log p, and with `weights` the loss and wanted gradients."""
    order = torch.argsort(rows, stable=True)
    needed, place, counts = torch.unique_consecutive(rows[order], return_inverse=True, return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    targets = targets[order]
    w = None if weights is None else weights[order].float()
    log_p = torch.empty(len(rows), device=hidden.device)
    rank = torch.empty(len(rows), dtype=torch.int64, device=hidden.device) if ranks else None
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if wants[0] else None
    d_weight = torch.zeros(head.weight.shape, device=hidden.device) if wants[1] else None
    d_bias = torch.zeros(len(head.weight), device=hidden.device) if wants[2] else None
    step = max(1, CHUNK_BYTES // (4 * len(head.weight)))
    for a in range(0, len(needed), step):
        b = min(a + step, len(needed))
        e = slice(ends[a], ends[b])
        h = hidden[needed[a:b]]
        z = (h @ head.weight.T).float()
        if head.bias is not None:
            z += head.bias
        z *= head.scale
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        r, t = place[e] - a, targets[e]
        lse = torch.logsumexp(z, -1)
        picked = z[r, t]
        log_p[e] = picked - lse[r]
        if rank is not None:
            rank[e] = (z > z.gather(1, t[:, None]) if len(r) == b - a else z[r] > picked[:, None]).sum(-1)
        if w is None:
            continue
        total += (w[e] * (head.z_loss * lse[r] ** 2 - log_p[e])).double().sum()
        if not any(wants):
            continue
        row_weight = torch.zeros(b - a, device=z.device).index_add_(0, r, w[e])
        g = torch.softmax(z, -1) * (row_weight * (1 + 2 * head.z_loss * lse))[:, None]
        g.index_put_((r, t), -w[e], accumulate=True)
        if head.softcap is not None:
            g *= 1 - (z / head.softcap) ** 2
        g *= head.scale
        if d_bias is not None:
            d_bias += g.sum(0)
        g = g.to(h.dtype)
        if d_hidden is not None:
            d_hidden[needed[a:b]] = g @ head.weight
        if d_weight is not None:
            d_weight += g.T @ h
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return _Swept(
        log_p[back],
        total.float(),
        d_hidden,
        None if d_weight is None else d_weight.to(head.weight.dtype),
        None if d_bias is None or head.bias is None else d_bias.to(head.bias.dtype),
        None if rank is None else rank[back],
    )


def _check(hidden: Tensor, head: _Head, rows: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
    if hidden.ndim != 2 or head.weight.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ModelError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(head.weight.shape)} don't fit",
            fix="give hidden [F, H] and weight [V, H]; flatten batch and sequence into F",
        )
    if rows.shape != targets.shape or rows.ndim != 1 or (weights is not None and weights.shape != rows.shape):
        raise ModelError("rows, targets and weights must be one-dimensional and of one length")
    for name, index, size in (("rows", rows, len(hidden)), ("targets", targets, len(head.weight))):
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ModelError(
                f"{name} has an index outside 0..{size - 1}",
                why="such an edge has no row or no token, and leaving it out would change the loss",
            )
