"""The selective head: log p and gradients for the tokens that a loss or a score needs, and for no other.

Rows of hidden states that carry no edge never meet the head, and there is no [tokens, vocabulary] tensor beyond
one chunk. Equals `ygivenx.reference.selective_cross_entropy`, as nearly as float32 does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..errors import ModelError
from . import kernel
from .edges import has_products
from .logit_head import LogitHead
from .passes import Needed, run_head

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16)  # no uint8: old code has masks in it


F = TypeVar("F", bound=Callable[..., object])


def _uncompiled(function: F) -> F:
    """Keep torch.compile out: the head reads indices, and memory by its address. Typed, as torch's own isn't."""
    return cast(F, torch.compiler.disable(function))


class HeadValues(NamedTuple):
    """log_p float32 [E]; on request, without gradients: rank int64 [E], how many tokens have a higher logit than the
    target (0 = greedy); entropy float32 [E] of the distribution that predicts it, in nats.
    """

    log_p: Tensor
    rank: Tensor | None = None
    entropy: Tensor | None = None


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
    options = {"needed": _needs_gradient(hidden, weight, bias), "z_loss": z_loss, "memory": memory}
    result: tuple[Tensor, Tensor] = _SelectiveLoss.apply(  # type: ignore[no-untyped-call]  # torch has no type for it
        hidden, weight, bias, rows, targets, weights, (softcap, scale), options
    )
    return result


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    memory: int | None = None,
) -> Tensor:
    """log Pr(targets[e] | row rows[e]), float32 [E], differentiable. Arguments as in `selective_cross_entropy`.

    See `head_values`, which gives more of each distribution.
    """
    head = LogitHead(weight, bias, softcap, scale)
    return head_values(hidden, head, rows, targets, memory=memory).log_p


@_uncompiled
def head_values(
    hidden: Tensor,
    head: LogitHead,
    rows: Tensor,
    targets: Tensor,
    *,
    ranks: bool = False,
    entropy: bool = False,
    memory: int | None = None,
) -> HeadValues:
    """log Pr(targets[e] | row rows[e]), with ranks and entropies from the same pass over the logits.

    log_p is differentiable like any torch function, once. On a CPU exponentials wait for backward in the memory of
    the head's gradient, where that holds all of them; otherwise backward recomputes the chunks, so that nothing of
    size [tokens, vocabulary] is kept beside it. Under torch.no_grad() no gradient is prepared.
    """
    _check(hidden, head.weight, head.bias, rows, targets)
    rows, targets = _int64(rows, hidden), _int64(targets, hidden)
    hidden, weight = _autocast(hidden), _autocast(head.weight)
    needed = _needs_gradient(hidden, weight, head.bias)
    options = {"needed": needed, "ranks": ranks, "entropy": entropy, "memory": memory}
    return HeadValues(
        *_SelectiveLogProbs.apply(  # type: ignore[no-untyped-call]  # torch has no type for it
            hidden, weight, head.bias, rows, targets, (head.softcap, head.scale), options
        )
    )


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


class _SelectiveLoss(torch.autograd.Function):
    """Gradients are computed in forward, where the exponentials are at hand, and returned in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                weights: Tensor, form: tuple[float | None, float], options: dict[str, Any],
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output = run_head(hidden, LogitHead(weight, bias, *form), rows, targets, weights, **options)
        if any(options["needed"]):
            ctx.save_for_backward(hidden, weight, bias, rows, targets, weights)
            ctx.form, ctx.options, ctx.gradients = form, options, output.into.all
        log_p = output.log_p
        ctx.mark_non_differentiable(log_p)
        return log_p, output.loss

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("the selective head")
        gradients, ctx.gradients = ctx.gradients, None
        hidden, weight, bias, *edges = ctx.saved_tensors
        if gradients is None:  # a second backward: the first one gave its gradients away
            gradients = run_head(hidden, LogitHead(weight, bias, *ctx.form), *edges, **ctx.options).into.all
        # On a CPU a factor of 1 costs no pass over dW. On a GPU to read it would wait for all that is queued.
        if grad.device.type != "cpu" or grad.item() != 1:
            for g in gradients:
                if g is not None:
                    g.mul_(grad)
        return (*_narrowed(gradients, hidden, weight, bias), *[None] * 5)


class _SelectiveLogProbs(torch.autograd.Function):
    """Weights are the gradients of log p, known in backward only: what isn't held until then is computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                form: tuple[float | None, float], options: dict[str, Any]) -> HeadValues:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, rows, targets)
        ctx.form, ctx.memory = form, options["memory"]
        output = run_head(hidden, LogitHead(weight, bias, *form), rows, targets, **options)
        ctx.head_pass = output if any(options["needed"]) else None
        values = HeadValues(output.log_p, output.rank, output.entropy)
        ctx.mark_non_differentiable(*(v for v in values[1:] if v is not None))
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("the selective head")
        hidden, weight, bias, *edges = ctx.saved_tensors
        output, ctx.head_pass = ctx.head_pass, None
        if output is None or not output.add_gradients(-grad):
            head, needed = LogitHead(weight, bias, *ctx.form), ctx.needs_input_grad[:3]
            output = run_head(hidden, head, edges[0], edges[1], -grad, needed, memory=ctx.memory)
        return (*_narrowed(output.into.all, hidden, weight, bias), *[None] * 4)


def refuse_second_derivatives(of: str) -> None:
    """Raise ModelError in a backward with create_graph=True, for a function whose gradients aren't differentiable."""
    if torch.is_grad_enabled():  # so it is in a backward with create_graph=True, and only there
        raise ModelError(
            f"{of} has no second derivatives",
            why="its gradients would silently count as constants under create_graph=True",
            fix="compute logits and cross-entropy with torch where they are needed",
        )


def _narrowed(gradients: tuple[Tensor | None, ...], *tensors: Tensor | None) -> list[Tensor | None]:
    """Gradients in the precision of what they are for, once they have been scaled."""
    return [
        None if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)
    ]


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
