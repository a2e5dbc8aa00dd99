"""Where the gradients of one call to the head go."""

from __future__ import annotations

import torch
from torch import Tensor

from . import pages
from .edges import Edges, Head, gathered


class Gradients:
    """dH, dW and the bias's gradient; None for those that nobody wants.

    Of float16 they are float32: the factor of a scaler, which keeps small ones from vanishing, is known in backward.
    """

    def __init__(self, hidden: Tensor, head: Head, wide: torch.dtype, wants: tuple[bool, bool, bool]) -> None:
        device = hidden.device
        self.hidden = torch.zeros_like(hidden, dtype=_safe(hidden.dtype)) if wants[0] else None
        self.weight = pages.empty(head.weight.shape, _safe(head.weight.dtype), device) if wants[1] else None
        self.bias = torch.zeros(len(head.weight), dtype=wide, device=device) if wants[2] else None

    @property
    def second_sweep(self) -> bool:
        """Whether anything beyond dH is wanted."""
        return self.weight is not None or self.bias is not None

    def settle(self, edges: Edges, a: int, b: int, factor: Tensor, g: Tensor, total: Tensor | None) -> None:
        """dH of columns [a, b): factor·Σ e[v]·W[v], where total holds the sum, plus what their targets add.

        factor float64 [b - a]; g float64, of their edges; total [at least b - a, H], which is overwritten.
        """
        if total is None or self.hidden is None:
            return
        mine, total = slice(edges.starts[a], edges.starts[b]), total[: b - a]
        column, target, head = edges.column[mine] - a, edges.target[mine], edges.head
        total *= factor[:, None].to(total.dtype)
        for part in gathered(len(target), total.device):
            terms = head.weight[target[part]] * (g[part] * head.scale).to(total.dtype)[:, None]
            total.index_add_(0, column[part], terms)
        self.hidden[edges.rows[a:b]] = total.to(self.hidden.dtype)


def _safe(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype
