"""The selective head: log p and gradients for the tokens that a loss or a score needs, and for no other.

Rows of hidden states that carry no edge never meet the head, and there is no [tokens, vocabulary] tensor beyond
one chunk. Equals `ygivenx.reference.selective_cross_entropy`, as nearly as float32 does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import torch
from torch import Tensor

from ..errors import ModelError
from . import kernel
from .edges import has_products
from .logit_head import LogitHead
from .passes import run_head

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16)  # no uint8: old code has masks in it


F = TypeVar("F", bound=Callable[..., object])


def _uncompiled(function: F) -> F:
    """Keep torch.compile out: the head reads indices, and memory by its address. Typed, as torch's own isn't."""
    return cast(F, torch.compiler.disable(function))


class Ranked(NamedTuple):
    """log_p float32 [E]; rank int64 [E]: tokens with a higher logit than the target, 0 = greedy."""

    log_p: Tensor
    rank: Tensor


@_uncompiled
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
    memory: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(log p per edge, Σ w·(−log p + z_loss·logsumexp²)) from only the rows that carry an edge.

    hidden [F, H], weight [V, H], bias [V] in float32, bfloat16 or float16 (computed in float32); rows, targets
    int64 [E] (or int32, int16): edge e asks row rows[e] for token targets[e], in any order, repeats allowed; weights
    float [E], of any sign. Under torch.autocast the products run in its dtype, as those of nn.Linear do; of two dtypes
    the wider one counts. Logits are z = scale·(h·Wᵀ + bias), then softcap·tanh(z / softcap).

    log_p float32 [E] is detached: for a loss whose weights depend on log p with gradients, use `log_probs`. The
    sum, a float32 scalar, is differentiable in hidden, weight and bias: once, and again after
    `backward(retain_graph=True)`, which computes them anew. Divide the weights rather than the sum: a factor of
    exactly 1 in backward costs no pass over the gradients.

    `memory` bytes may be held beyond the gradients: by default 64 MB on a CPU, where more makes large vocabularies a
    little faster in float32, and 512 MB on a GPU, where 256 rows of logits are held at least.
    Raises ModelError for shapes or indices that don't fit or aren't integers, and for weights that ask for a gradient.
    """
    _check(hidden, weight, bias, rows, targets, weights)
    rows, targets, weights = _int64(rows, hidden), _int64(targets, hidden), weights.to(hidden.device)
    hidden, weight = _autocast(hidden), _autocast(weight)
    needed = _needs_gradient(hidden, weight, bias)
    result: tuple[Tensor, Tensor] = _SelectiveLoss.apply(  # type: ignore[no-untyped-call]  # torch has no type for it
        hidden, weight, bias, rows, targets, weights, softcap, scale, z_loss, needed, memory
    )
    return result


@overload
def log_probs(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
    softcap: float | None = ..., scale: float = ..., ranks: Literal[False] = ..., memory: int | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def log_probs(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
    softcap: float | None = ..., scale: float = ..., ranks: Literal[True], memory: int | None = ...,
) -> Ranked: ...  # fmt: skip
@_uncompiled
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
    memory: int | None = None,
) -> Tensor | Ranked:
    """log Pr(targets[e] | row rows[e]), float32 [E]; with `ranks` also how many tokens are more probable.

    Differentiable like any torch function, once: backward recomputes the chunks, so nothing of size
    [tokens, vocabulary] is kept. Under torch.no_grad() no gradient is prepared. Arguments as in
    `selective_cross_entropy`.
    """
    _check(hidden, weight, bias, rows, targets)
    rows, targets = _int64(rows, hidden), _int64(targets, hidden)
    hidden, weight = _autocast(hidden), _autocast(weight)
    if ranks:
        output = run_head(hidden, LogitHead(weight, bias, softcap, scale), rows, targets, ranks=True)
        assert output.rank is not None
        return Ranked(output.log_p, output.rank)
    log_p: Tensor = _SelectiveLogProbs.apply(  # type: ignore[no-untyped-call]  # torch has no type for it
        hidden, weight, bias, rows, targets, softcap, scale, memory
    )
    return log_p


def explain() -> dict[str, str]:
    """Which route runs on this machine by device and dtype, and why; builds the compiled kernel if it can."""
    reason = kernel.why_not()
    missing = f"torch, as the compiled kernel is missing: {reason}"
    waiting = "torch while half of the exponentials fit into the head's gradient, else the compiled kernel"
    no_products = (
        "" if has_products(torch.bfloat16) else "; its products are float32, as this CPU has no others"
    )
    return {
        "cpu float32": missing
        if reason
        else waiting
        if kernel.fast_float32()
        else "torch: this CPU has no AMX",
        "cpu bfloat16": missing + no_products if reason else "compiled kernel",
        "cpu float16": "torch; its products are float32",
        "cuda": "torch: the whole vocabulary at once, for as many rows as 512 MB hold",
        "soft-cap": "torch",
    }


Needed = tuple[bool, bool, bool]  # which gradients: of hidden, weight, bias


class _SelectiveLoss(torch.autograd.Function):
    """Gradients are computed in forward, where the exponentials are at hand, and returned in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                weights: Tensor, softcap: float | None, scale: float, z_loss: float, needed: Needed,
                memory: int | None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        head = LogitHead(weight, bias, softcap, scale)
        output = run_head(hidden, head, rows, targets, weights, needed, z_loss=z_loss, memory=memory)
        if any(needed):
            ctx.save_for_backward(hidden, weight, bias, rows, targets, weights)
            ctx.softcap, ctx.scale, ctx.z_loss, ctx.needed, ctx.memory = (
                softcap,
                scale,
                z_loss,
                needed,
                memory,
            )
            ctx.gradients, ctx.dtypes = output.gradients, _dtypes(hidden, weight, bias)
        ctx.mark_non_differentiable(output.log_p)
        return output.log_p, output.loss

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("the selective head")
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward: the first one gave its gradients away
            hidden, weight, bias, rows, targets, weights = ctx.saved_tensors
            head = LogitHead(weight, bias, ctx.softcap, ctx.scale)
            gradients = run_head(
                hidden, head, rows, targets, weights, ctx.needed, z_loss=ctx.z_loss, memory=ctx.memory
            ).gradients
        # On a CPU a factor of 1 costs no pass over dW. On a GPU to read it would wait for all that is queued.
        if grad.device.type != "cpu" or grad.item() != 1:
            for g in gradients:
                if g is not None:
                    g.mul_(grad)
        return (*_narrowed(gradients, ctx.dtypes), *[None] * 8)


class _SelectiveLogProbs(torch.autograd.Function):
    """Weights are the gradients of log p, known in backward only: there everything is computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                softcap: float | None, scale: float, memory: int | None) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, rows, targets)
        ctx.softcap, ctx.scale, ctx.memory = softcap, scale, memory
        return run_head(hidden, LogitHead(weight, bias, softcap, scale), rows, targets).log_p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("the selective head")
        hidden, weight, bias, rows, targets = ctx.saved_tensors
        head, needed = LogitHead(weight, bias, ctx.softcap, ctx.scale), ctx.needs_input_grad[:3]
        output = run_head(hidden, head, rows, targets, -grad, needed, memory=ctx.memory)
        return (*_narrowed(output.gradients, _dtypes(hidden, weight, bias)), *[None] * 5)


def refuse_second_derivatives(of: str) -> None:
    """Raise ModelError in a backward with create_graph=True, for a function whose gradients aren't differentiable."""
    if torch.is_grad_enabled():  # so it is in a backward with create_graph=True, and only there
        raise ModelError(
            f"{of} has no second derivatives",
            why="its gradients would silently count as constants under create_graph=True",
            fix="compute logits and cross-entropy with torch where they are needed",
        )


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


def _narrowed(gradients: tuple[Tensor | None, ...], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """Gradients in the precision of what they are for, once they have been scaled."""
    return [None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _int64(index: Tensor, hidden: Tensor) -> Tensor:
    return index.to(hidden.device, torch.int64).contiguous()  # the compiled kernel reads its memory


def _needs_gradient(*tensors: Tensor | None) -> Needed:
    hidden, weight, bias = (t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors)
    return hidden, weight, bias


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ModelError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} don't fit",
            fix="give hidden [F, H] and weight [V, H]; flatten batch and sequence into F",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ModelError(f"bias {tuple(bias.shape)} doesn't fit a vocabulary of {len(weight)}")
    if rows.shape != targets.shape or rows.ndim != 1 or (weights is not None and weights.shape != rows.shape):
        raise ModelError(
            "rows, targets and weights must be one-dimensional and of one length",
            why="each edge is one row, one target and one weight",
        )
    if weights is not None and weights.requires_grad:
        raise ModelError(
            "weights ask for a gradient, and here they are constants",
            fix="detach them, or build the loss from log_probs(...), which is differentiable",
        )
    for name, index, size in (("rows", rows, len(hidden)), ("targets", targets, len(weight))):
        if index.dtype not in INDEX_DTYPES:
            raise ModelError(
                f"{name} are {str(index.dtype).removeprefix('torch.')}",
                why="edges are named by numbers: a mask or a rounded number would name others",
                fix="give int64; a mask becomes numbers by mask.nonzero()[:, 0]",
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ModelError(
                f"{name} has an index outside 0..{size - 1}",
                why="such an edge has no row or no token, and leaving it out would change the loss",
            )
