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
from .tiled import MEMORY_BYTES, TiledRound, run_tiled

Needed = tuple[bool, bool, bool]  # which gradients: of hidden, weight, bias


@dataclass
class HeadPass:
    """The sums of one call to the head, and its gradients as soon as there are weights."""

    edges: EdgeColumns
    into: Gradients
    round: TiledRound | None = None  # which holds what the gradients need, until they are made

    @property
    def log_p(self) -> Tensor:
        """float32 [E], or float64 where the head is."""
        return self._of_edges(self.edges.log_p).to(self.edges.wide)

    @property
    def loss(self) -> Tensor:
        """Σ w·(−log p + z_loss·logsumexp²), a scalar."""
        return self.edges.loss().to(self.edges.wide)

    @property
    def rank(self) -> Tensor | None:
        """int64 [E], if it was asked for: how many tokens have a higher logit than the target."""
        return self._of_edges(self.edges.above[self.edges.column]) if self.edges.ranks else None

    @property
    def entropy(self) -> Tensor | None:
        """float32 [E], if it was asked for: of the distribution that predicts the target, in nats."""
        if not self.edges.entropy:
            return None
        return self._of_edges(self.edges.entropies()[self.edges.column]).to(self.edges.wide)

    def _of_edges(self, values: Tensor) -> Tensor:
        return self.edges.in_input_order(values)

    @torch.no_grad()
    def add_gradients(self, weights: Tensor) -> bool:
        """Whether the gradients could be made of what the pass holds; it holds nothing afterwards."""
        held, self.round = self.round, None
        if held is not None:
            with torch.autocast(weights.device.type, enabled=False):
                held.add_gradients(weights)
        return held is not None


@torch.no_grad()
def run_head(
    hidden: Tensor,
    head: LogitHead,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    needed: Needed = (False, False, False),
    *,
    z_loss: float = 0.0,
    ranks: bool = False,
    entropy: bool = False,
    memory: int | None = None,
) -> HeadPass:
    """log p of every edge; with `weights` the needed gradients. Without, what these need is held where it fits."""
    with torch.autocast(hidden.device.type, enabled=False):
        # The two may differ, as where only the head is kept in float32: the wider dtype counts.
        wide = torch.promote_types(hidden.dtype, head.weight.dtype)
        head = replace(head, weight=head.weight.to(wide))
        edges = EdgeColumns(hidden, head, rows, targets, weights, z_loss=z_loss, ranks=ranks, entropy=entropy)
        into = Gradients(hidden, head, edges.wide, needed)
        # dW is written by the first round, not added to; without an edge there is no round.
        if into.weight is not None and not len(rows):
            into.weight.zero_()
        if launches_are_costly(hidden.device):
            run_full_vocab(edges, into, GPU_MEMORY_BYTES if memory is None else memory)
            return HeadPass(edges, into)
        return HeadPass(edges, into, run_tiled(edges, into, MEMORY_BYTES if memory is None else memory))


def launches_are_costly(device: torch.device) -> bool:
    """Whether each operation costs as much as a tile of numbers does."""
    return device.type != "cpu"
