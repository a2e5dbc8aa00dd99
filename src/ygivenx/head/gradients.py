"""Where the gradients of one call to the head go."""

from __future__ import annotations

import torch
from torch import Tensor

from . import pages
from .edges import EdgeColumns, gather_slices
from .logit_head import LogitHead


class Gradients:
    """dH, dW and the bias's gradient; None for those that are not needed.

    Of float16 they are float32: the factor of a scaler, which keeps small ones from vanishing, is known in backward.
    """

    def __init__(
        self, hidden: Tensor, head: LogitHead, wide: torch.dtype, needed: tuple[bool, bool, bool]
    ) -> None:
        device = hidden.device
        self.hidden = torch.zeros_like(hidden, dtype=_accumulated(hidden.dtype)) if needed[0] else None
        self.weight = (
            pages.empty(head.weight.shape, _accumulated(head.weight.dtype), device) if needed[1] else None
        )
        self.bias = torch.zeros(len(head.weight), dtype=wide, device=device) if needed[2] else None

    @property
    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias

    @property
    def needed(self) -> bool:
        return any(g is not None for g in self.all)

    @property
    def second_sweep(self) -> bool:
        """Whether anything beyond dH is needed."""
        return self.weight is not None or self.bias is not None

    def add_hidden(
        self, edges: EdgeColumns, a: int, b: int, factor: Tensor, g: Tensor, total: Tensor | None
    ) -> None:
        """dH of columns [a, b): factor·Σ e[v]·W[v], where total holds the sum, plus what their targets add.

        factor float64 [b - a]; g float64, of their edges; total [at least b - a, H], which is overwritten.
        """
        if total is None or self.hidden is None:
            return
        mine, total = slice(edges.starts[a], edges.starts[b]), total[: b - a]
        column, target, head = edges.column[mine] - a, edges.target[mine], edges.head
        total *= factor[:, None].to(total.dtype)
        for part in gather_slices(len(target), total.device):
            terms = head.weight[target[part]] * (g[part] * head.scale).to(total.dtype)[:, None]
            total.index_add_(0, column[part], terms)
        # With ranks a row may have several columns.
        self.hidden.index_add_(0, edges.rows[a:b], total.to(self.hidden.dtype))


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype
