"""The route of the compiled kernel: both sweeps of `tiled.py`, and no exponential leaves the cache.

The second sweep computes the exponentials again: in bfloat16 that costs less than writing them down.
Rows are packed as the matrix kernels read them, x for logits and y = factor·x for dW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel
from .edges import EdgeColumns, even_spans, padded
from .gradients import Gradients
from .tiles import HUGE_SUM, Marks, Scratch

TOTAL_BYTES = 8 << 20  # of Σ e[v]·W[v], float32, in one first sweep
WIDTH = kernel.WIDTH


def run_fused(edges: EdgeColumns, into: Gradients, memory: int) -> None:
    """Compute the sums of `edges` and add the gradients to `into`, in rounds whose x and y fit into `memory`."""
    weight = edges.head.weight
    # Columns of a block come in whole groups of WIDTH, as the kernel reads them.
    block = max(1, TOTAL_BYTES // (4 * weight.shape[1] * WIDTH)) * WIDTH
    scratch = Scratch(weight.device)
    # Half of `memory` holds the packed columns, x and y for each.
    fits = memory // 2 // (2 * kernel.bytes_of_column(weight)) // WIDTH * WIDTH
    for a, b in even_spans(0, len(edges.rows), max(fits, block) if into.second_sweep else block, WIDTH):
        _FusedRound(edges, a, b, into, scratch).run(block)


class _FusedRound:
    """Columns [a, b) of the edges, whose share of dW is made together."""

    def __init__(self, edges: EdgeColumns, a: int, b: int, into: Gradients, scratch: Scratch) -> None:
        self.edges, self.a, self.b, self.into = edges, a, b, into
        hidden = edges.hidden.to(edges.head.weight.dtype).contiguous()
        self.columns = kernel.Columns(hidden, edges.rows[a:b], padded(b - a), scratch)
        self.shift, self.factor = kernel.zeros(2, padded(b - a))
        self.shift[: b - a] = edges.shift[a:b]
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []

    def run(self, block: int) -> None:
        for a, b in even_spans(self.a, self.b, block, WIDTH):
            self._add_gradients(a, b, self._first_sweep(a, b))
        if self.into.second_sweep:
            marks = Marks(*(torch.cat(parts) for parts in zip(*self.held, strict=True)))
            self.columns.second_sweep(
                self._tiles(self.a, self.b), self.factor, marks, self.into, add=self.a > 0
            )

    def _add_gradients(self, a: int, b: int, total: Tensor | None) -> None:
        """Add the share of columns [a, b) to dH, and keep what their share of dW needs."""
        if self.edges.weight is None:
            return
        factor, g, (token, column, held) = self.edges.coefficients(a, b)
        self.factor[a - self.a : b - self.a] = factor
        self.held.append((token, column + a - self.a, held))
        self.into.add_hidden(self.edges, a, b, factor, g, total)

    def _tiles(self, a: int, b: int) -> kernel.SweepInput:
        edges = self.edges
        column = torch.arange(b - a, device="cpu")
        targets = Marks(edges.target[edges.first[a:b]], column, kernel.zeros(b - a))
        return kernel.SweepInput(edges.head, a - self.a, padded(b - a), self.shift[a - self.a :], targets)

    def _first_sweep(self, a: int, b: int) -> Tensor | None:
        """Compute log p of columns [a, b); returns Σ e[v]·W[v] if dH is needed."""
        edges, product = self.edges, self.into.hidden is not None
        sums = edges.new_sums(padded(b - a), ranks=edges.ranks)
        total = self.columns.first_sweep(self._tiles(a, b), sums, product=product)
        far = (~(sums.e[: b - a] <= HUGE_SUM)).nonzero()[:, 0]  # NaN as well
        if len(far):
            self.shift[far + a - self.a] = edges.highest_logits(far + a).float()
            above = sums.above  # counted at the target
            sums = edges.new_sums(padded(b - a), ranks=False)
            total = self.columns.first_sweep(self._tiles(a, b), sums, product=product)
            sums.above = above
        edges.set_sums(a, b, self.shift[a - self.a :], sums)
        return total
