"""The sweeps of `sweep.py` where memory is wide and every launch costs: on a GPU.

The same sums in the same terms, with the whole vocabulary at once for as many rows as fit into the memory that a call
may hold. Tiles here are [rows, tokens of the vocabulary], and each is done with before the next one is made. The shift
of a row's exponentials is the highest logit m beside its target's, so that the largest of them is 1, whatever the
precision; statistics are told with s, the highest of all, so that nothing overflows:

    e[v] = exp(z[v] - m),  S = lift·sum of e,  lift = exp(m - s),  k = lift·c / Z
"""

from __future__ import annotations

import torch
from torch import Tensor

from .edges import PAD, Edges, even
from .gradients import Gradients

MEMORY = 512 << 20  # bytes beyond the gradients that a call may hold on to
LEAST = 256  # rows at a time, however many bytes that takes


def sweep(edges: Edges, into: Gradients, memory: int, *, ranks: bool) -> None:
    """Statistics into `edges`, gradients into `into`."""
    weight = edges.head.weight
    logits = 1 if edges.head.softcap is None else 3  # with a cap also their squares and slopes
    narrowed = weight.itemsize if weight.dtype != edges.wide else 0
    of_a_row = len(weight) * (logits * edges.wide.itemsize + narrowed)
    for a, b in even(0, len(edges.rows), max(LEAST, memory // of_a_row // PAD * PAD)):
        _sweep(edges, into, a, b, ranks)


def _sweep(edges: Edges, into: Gradients, a: int, b: int, ranks: bool) -> None:
    """Rows [a, b). What this holds is freed before the next ones come."""
    x = edges.hidden[edges.rows[a:b]].to(edges.head.weight.dtype)
    e, slope, lift = _exponentials(edges, a, b, x, ranks)
    if edges.weight is not None:
        _gradients(edges, into, a, b, x, e if slope is None else e.mul_(slope), lift)


def _exponentials(
    edges: Edges, a: int, b: int, x: Tensor, ranks: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(e [rows, V], 0 at the rows' targets; slope of the cap; lift float64), statistics of rows [a, b) settled."""
    head, target = edges.head, edges.target[edges.first[a:b], None]
    z = product(x, head.weight.T, edges.wide)
    if head.bias is not None:
        z += head.bias
    if head.scale != 1:
        z *= head.scale
    z, slope = head.capped(z)
    above = (z > z.gather(1, target)).sum(1) if ranks else None
    z.scatter_(1, target, -torch.inf)
    m = z.amax(1).double()
    shift = torch.maximum(edges.shift[a:b], m)
    lift = (m - shift).exp()
    # With no other token, or only masked ones, m is -inf, and so is z.
    e = z.sub_(m.where(m > -torch.inf, 0.0).to(z.dtype)[:, None]).exp_()
    edges.settle(a, b, shift, e.sum(1).double() * lift, above)
    return e, slope, lift


def _gradients(edges: Edges, into: Gradients, a: int, b: int, x: Tensor, e: Tensor, lift: Tensor) -> None:
    """The share of rows [a, b) in the gradients; `e` is overwritten."""
    weight = edges.head.weight
    factor, g, (token, row, _) = edges.coefficients(a, b)
    factor = factor * lift
    at_targets = g * edges.head.scale
    if into.bias is not None:
        into.bias += e.T @ factor.to(e.dtype)
        into.bias.index_add_(0, token, at_targets.to(e.dtype))
    if into.hidden is not None:
        into.settle(edges, a, b, factor, g, product(e.to(weight.dtype), weight, edges.wide))
    if into.weight is None:
        return
    unit = _unit(factor, at_targets) if weight.dtype == torch.float16 else 1.0
    e *= (factor / unit).to(e.dtype)[:, None]
    e.index_put_((row, token), (at_targets / unit).to(e.dtype), accumulate=True)
    _add(into.weight, e.to(weight.dtype).T, x, unit, first=a == 0)


def _unit(factor: Tensor, at_targets: Tensor) -> Tensor:
    """In which neither factors vanish in float16 nor what stands at a target is too large."""
    return torch.maximum(factor.abs().amax(), at_targets.abs().amax() / 2**14).clamp_min(1e-38)


def _add(out: Tensor, left: Tensor, right: Tensor, unit: Tensor | float, first: bool) -> None:
    """unit·(left @ right); `out` is float32 where they are float16."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=int(not first), out=out)
        return
    made = product(left, right, out.dtype).mul_(unit)
    out.copy_(made if first else made.add_(out))


def product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left @ right in this dtype, however narrow they are: sums of their products are rounded to no other."""
    if left.dtype == wide:
        return left @ right
    if left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # since torch 2.8
        return torch.mm(left, right, out_dtype=wide)
    if left.dtype == torch.float16:  # in which sums may overflow
        return left.to(wide) @ right.to(wide)
    made = left @ right
    return made.to(wide).add_(torch.addmm(made, left, right, beta=-1))  # and what rounding it lost
