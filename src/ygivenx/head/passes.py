"""One pass through the head: which route computes it, and what it gives.

Equals `ygivenx.reference.selective_cross_entropy` (all logits in float64, torch's own autograd) and `ranks`, to the
rounding of the products' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .edges import EdgeColumns
from .full_vocab import MEMORY_BYTES as GPU_MEMORY_BYTES
from .full_vocab import run_full_vocab
from .gradients import Gradients
from .logit_head import LogitHead
from .tiled import MEMORY_BYTES, run_tiled


@dataclass(frozen=True)
class HeadOutput:
    """log_p [E]; rank int64 [E] with `ranks`; loss scalar; gradients where they were needed, of any precision."""

    log_p: Tensor
    rank: Tensor | None
    loss: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


@torch.no_grad()
def run_head(
    hidden: Tensor,
    head: LogitHead,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    needed: tuple[bool, bool, bool] = (False, False, False),
    *,
    z_loss: float = 0.0,
    ranks: bool = False,
    memory: int | None = None,
) -> HeadOutput:
    """log p of every edge; with `weights` the loss and the needed gradients (of hidden, weight, bias)."""
    with torch.autocast(hidden.device.type, enabled=False):
        # The two may differ, as where only the head is kept in float32: the wider dtype counts.
        wide = torch.promote_types(hidden.dtype, head.weight.dtype)
        head = replace(head, weight=head.weight.to(wide))
        edges = EdgeColumns(hidden, head, rows, targets, weights, z_loss=z_loss, one_each=ranks)
        into = Gradients(hidden, head, edges.wide, needed)
        # dW is written by the first round, not added to; without an edge there is no round.
        if into.weight is not None and not len(rows):
            into.weight.zero_()
        if launches_are_costly(hidden.device):
            run_full_vocab(edges, into, GPU_MEMORY_BYTES if memory is None else memory, ranks=ranks)
        else:
            run_tiled(edges, into, MEMORY_BYTES if memory is None else memory, ranks=ranks)
        return HeadOutput(
            edges.in_input_order(edges.log_p).to(edges.wide),
            edges.in_input_order(edges.above[edges.column]) if ranks else None,
            None if weights is None else edges.loss().to(edges.wide),
            into.hidden,
            into.weight,
            into.bias,
        )


def launches_are_costly(device: torch.device) -> bool:
    """Whether each operation costs as much as a tile of numbers does."""
    return device.type != "cpu"
