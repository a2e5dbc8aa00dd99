"""The selective head: log p and gradients for the tokens that a loss or a score needs, and for no other.

Rows of hidden states that carry no edge never meet the head, and there is no [tokens, vocabulary] tensor beyond
one chunk. The readable twin is `head_reference.py`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import ModelError
from .head_sweep import Head, sweep


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
    head = Head(weight, bias, softcap, scale, z_loss)
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
    head = Head(weight, bias, softcap, scale)
    _check(hidden, head, rows, targets)
    if ranks:
        swept = sweep(hidden.detach(), head, rows, targets, ranks=True)
        assert swept.rank is not None
        return Ranked(swept.log_p, swept.rank)
    return _LogProbs.apply(hidden, weight, bias, rows, targets, head)


def explain() -> dict[str, str]:
    """Which route would run on this machine, and why."""
    return {"cpu": "torch, in chunks", "cuda": "torch, in chunks"}


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                weights: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        wants = ctx.needs_input_grad[:3]
        swept = sweep(hidden, head, rows, targets, weights, wants)
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
            head = Head(weight, bias, ctx.head.softcap, ctx.head.scale, ctx.head.z_loss)
            made = sweep(hidden, head, rows, targets, weights, ctx.needs_input_grad[:3])
        grads = (made.hidden, made.weight, made.bias)
        if grad.device.type != "cpu" or grad.item() != 1:
            for g in grads:
                if g is not None:
                    g.mul_(grad)
        return (*grads, None, None, None, None)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                head: Head) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, rows, targets)
        ctx.head = head
        return sweep(hidden, head, rows, targets).log_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, rows, targets = ctx.saved_tensors
        head = Head(weight, bias, ctx.head.softcap, ctx.head.scale)
        swept = sweep(hidden, head, rows, targets, -grad, ctx.needs_input_grad[:3])
        return swept.hidden, swept.weight, swept.bias, None, None, None


def _check(hidden: Tensor, head: Head, rows: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
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
