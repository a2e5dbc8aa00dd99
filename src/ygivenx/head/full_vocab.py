"""The route on a GPU, where memory is wide and every launch costs: the whole vocabulary at once.

The sums and terms of `tiled.py`, for as many rows at a time as fit into the memory that a call may hold. Tiles are
[rows, tokens of the vocabulary], and each is done with before the next one is made. The shift
of a row's exponentials is the highest logit m beside its target's, so that the largest of them is 1, whatever the
precision; sums are kept relative to s, the highest of all, so that nothing overflows:

    e[v] = exp(z[v] - m),  S = lift·sum of e,  lift = exp(m - s),  k = lift·c / Z
"""

from __future__ import annotations

import torch
from torch import Tensor

from .edges import NOTHING, PAD, ColumnSums, EdgeColumns, even_spans
from .gradients import Gradients

MEMORY_BYTES = 512 << 20  # beyond the gradients, that a call may hold on to
LEAST_ROWS = 256  # at a time, however many bytes that takes: fewer leave a GPU idle


def run_full_vocab(edges: EdgeColumns, into: Gradients, memory: int) -> None:
    """Compute the sums of `edges` and add the gradients to `into`."""
    weight = edges.head.weight
    logits = 1 if edges.head.softcap is None else 3  # with a cap also their squares and slopes
    logits += edges.entropy
    narrowed = weight.itemsize if weight.dtype != edges.wide else 0
    of_a_row = len(weight) * (logits * edges.wide.itemsize + narrowed)
    for a, b in even_spans(0, len(edges.rows), max(LEAST_ROWS, memory // of_a_row // PAD * PAD)):
        _run_rows(edges, into, a, b)


def _run_rows(edges: EdgeColumns, into: Gradients, a: int, b: int) -> None:
    """Rows [a, b). What this holds is freed before the next ones come."""
    x = edges.hidden[edges.rows[a:b]].to(edges.head.weight.dtype)
    e, slope, lift = _exponentials(edges, a, b, x)
    if edges.weight is not None:
        _gradients(edges, into, a, b, x, e if slope is None else e.mul_(slope), lift)


def _exponentials(edges: EdgeColumns, a: int, b: int, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """(e [rows, V], 0 at the rows' targets; slope of the cap; lift float64). Stores the sums of rows [a, b)."""
    head, target = edges.head, edges.target[edges.first[a:b], None]
    z = product(x, head.weight.T, edges.wide)
    if head.bias is not None:
        z += head.bias
    if head.scale != 1:
        z *= head.scale
    z, slope = head.cap_(z)
    above = (z > z.gather(1, target)).sum(1) if edges.ranks else None
    z.scatter_(1, target, -torch.inf)
    m = z.amax(1).double()
    # s is the highest of all logits, m the highest beside the target. Relative to m exponentials are at most 1, and
    # the largest of them is 1, however far above them the target lies; `lift` brings their sum to s.
    shift = torch.maximum(edges.shift[a:b], m)
    lift = (m - shift).exp()
    # With no other token, or only masked ones, m is -inf, and so is z.
    z.sub_(m.where(m > -torch.inf, 0.0).to(z.dtype)[:, None])
    below = z.clamp(min=NOTHING) if edges.entropy else None
    e = z.exp_()
    total = e.sum(1).double()
    moments = None
    if below is not None:  # relative to s, as is the sum
        moments = lift * (below.mul_(e).sum(1).double() + (m - shift).clamp_min(NOTHING) * total)
    edges.set_sums(a, b, shift, ColumnSums(total * lift, moments, above))
    return e, slope, lift


def _gradients(
    edges: EdgeColumns, into: Gradients, a: int, b: int, x: Tensor, e: Tensor, lift: Tensor
) -> None:
    """The share of rows [a, b) in the gradients; `e` is overwritten."""
    weight = edges.head.weight
    factor, g, (token, row, _) = edges.coefficients(a, b)
    factor = factor * lift
    at_targets = g * edges.head.scale
    if into.bias is not None:
        into.bias += e.T @ factor.to(e.dtype)
        into.bias.index_add_(0, token, at_targets.to(e.dtype))
    if into.hidden is not None:
        into.add_hidden(edges, a, b, factor, g, product(e.to(weight.dtype), weight, edges.wide))
    if into.weight is None:
        return
    # Only float16 needs it: bfloat16 has the range of float32.
    unit = _unit(factor, at_targets) if weight.dtype == torch.float16 else 1.0
    e *= (factor / unit).to(e.dtype)[:, None]
    e.index_put_((row, token), (at_targets / unit).to(e.dtype), accumulate=True)
    _add(into.weight, e.to(weight.dtype).T, x, unit, first=a == 0)


def _unit(factor: Tensor, at_targets: Tensor) -> Tensor:
    """The unit in which factors don't vanish in float16, and values at targets don't overflow it.

    float16 ends at 65,504: 2¹⁴ leaves room for one exponential (at most 1) times its factor beside them.
    """
    return torch.maximum(factor.abs().amax(), at_targets.abs().amax() / 2**14).clamp_min(1e-38)


def _add(out: Tensor, left: Tensor, right: Tensor, unit: Tensor | float, first: bool) -> None:
    """unit·(left @ right); `out` is float32 where they are float16."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=int(not first), out=out)
        return
    share = product(left, right, out.dtype).mul_(unit)
    out.copy_(share if first else share.add_(out))


def product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left @ right in this dtype, however narrow they are: sums of their products are rounded to no other."""
    if left.dtype == wide:
        return left @ right
    if left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # since torch 2.8
        return torch.mm(left, right, out_dtype=wide)
    if left.dtype == torch.float16:  # in which sums may overflow
        return left.to(wide) @ right.to(wide)
    rounded = left @ right
    return rounded.to(wide).add_(torch.addmm(rounded, left, right, beta=-1))  # and what rounding it lost
