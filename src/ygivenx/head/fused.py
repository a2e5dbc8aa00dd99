"""The sweeps of `sweep.py` in the compiled kernel: no exponential leaves the cache.

So none has to wait for the second sweep, which computes them again: in bfloat16 that costs less than writing them
down. Rows are packed as the matrix kernels read them, x for logits and y = factor·x for dW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel
from .edges import Edges, even, padded
from .gradients import Gradients
from .tiles import HUGE, Marks, Scratch

BLOCK = 8 << 20  # bytes of Σ e[v]·W[v], float32, of one first sweep
WIDTH = kernel.WIDTH


def sweep(edges: Edges, into: Gradients, memory: int, *, ranks: bool) -> None:
    """Statistics into `edges`, gradients into `into`, in rounds of columns of which x and y fit into `memory`."""
    weight = edges.head.weight
    block = max(1, BLOCK // (4 * weight.shape[1] * WIDTH)) * WIDTH
    scratch = Scratch(weight.device)
    fits = memory // 2 // (2 * kernel.bytes_of_column(weight)) // WIDTH * WIDTH
    for a, b in even(0, len(edges.rows), max(fits, block) if into.second_sweep else block, WIDTH):
        _Round(edges, a, b, into, scratch).sweep(block, ranks=ranks)


class _Round:
    """Columns [a, b) of the edges, whose share of dW is made together."""

    def __init__(self, edges: Edges, a: int, b: int, into: Gradients, scratch: Scratch) -> None:
        self.edges, self.a, self.b, self.into = edges, a, b, into
        hidden = edges.hidden.to(edges.head.weight.dtype).contiguous()
        self.columns = kernel.Columns(hidden, edges.rows[a:b], padded(b - a), scratch)
        self.shift, self.factor = kernel.zeros(2, padded(b - a))
        self.shift[: b - a] = edges.shift[a:b]
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []

    def sweep(self, block: int, *, ranks: bool) -> None:
        for a, b in even(self.a, self.b, block, WIDTH):
            self._settle(a, b, self._first(a, b, ranks))
        if self.into.second_sweep:
            marks = Marks(*(torch.cat(parts) for parts in zip(*self.held, strict=True)))
            self.columns.second(self._tiles(self.a, self.b), self.factor, marks, self.into, add=self.a > 0)

    def _settle(self, a: int, b: int, total: Tensor | None) -> None:
        """Once the statistics of columns [a, b) are known: their share of dH, and what their share of dW needs."""
        if self.edges.weight is None:
            return
        factor, g, (token, column, held) = self.edges.coefficients(a, b)
        self.factor[a - self.a : b - self.a] = factor
        self.held.append((token, column + a - self.a, held))
        self.into.settle(self.edges, a, b, factor, g, total)

    def _tiles(self, a: int, b: int) -> kernel.Tiles:
        edges = self.edges
        column = torch.arange(b - a, device="cpu")
        targets = Marks(edges.target[edges.first[a:b]], column, kernel.zeros(b - a))
        return kernel.Tiles(edges.head, a - self.a, padded(b - a), self.shift[a - self.a :], targets)

    def _first(self, a: int, b: int, ranks: bool) -> Tensor | None:
        """Settles log p of columns [a, b) and gives Σ e[v]·W[v] if dH is wanted."""
        edges, product = self.edges, self.into.hidden is not None
        sums, above, total = self.columns.first(self._tiles(a, b), product=product)
        far = (~(sums[: b - a] <= HUGE)).nonzero()[:, 0]  # NaN as well
        if len(far):
            self.shift[far + a - self.a] = edges.highest(far + a).float()
            # Ranks were counted at the target.
            sums, _, total = self.columns.first(self._tiles(a, b), product=product)
        edges.settle(a, b, self.shift[a - self.a :], sums, above if ranks else None)
        return total
