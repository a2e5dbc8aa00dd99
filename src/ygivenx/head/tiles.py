"""Tiles of exponentials for `tiled.py`: [tokens of the vocabulary, columns], in working memory that is used again.

Softmax sees float32, as the sums do. Where products run in bfloat16, a logit is the product rounded to bfloat16 plus
what that rounding left over, from a second product; where they don't, tiles of the head are copied to float32.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from . import pages
from .edges import GATHERED, NOTHING, ColumnSums, EdgeColumns, slices

# A column whose other exponentials add up to more than this is computed again, shifted by its maximum: float32 ends at
# 3e38, and a sum near it, infinite or NaN says nothing of log p.
HUGE_SUM = 1e20
# Products of few columns may add up term by term: over a vocabulary of 49,152 that cost more than a digit (MKL, AVX2).
FEW_COLUMNS = 16
TERMS_AT_ONCE = 2048


class Scratch:
    """Working memory that every tile uses again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat: dict[str, Tensor] = {}

    def view(self, name: str, height: int, width: int, dtype: torch.dtype, *, thin: bool = False) -> Tensor:
        flat = self.flat.get(name)
        if flat is None or len(flat) < height * width:
            flat = self.flat[name] = pages.empty((height * width,), dtype, self.device)
        return as_tile(flat, height, width, thin)

    def cast(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """`values` in this dtype: themselves, or a copy."""
        if values.dtype == dtype:
            return values
        height, width = values.shape
        return self.view(name, height, width, dtype).copy_(values)


class Marks:
    """Values to be added to single elements of the tiles: (token, column, value), in order of token."""

    def __init__(self, token: Tensor, column: Tensor, value: Tensor) -> None:
        order = torch.argsort(token)
        self.token, self.column, self.value = token[order], column[order], value[order]
        self.tokens: list[int] = self.token.tolist()

    def within(self, start: int, stop: int) -> slice:
        return slice(bisect_left(self.tokens, start), bisect_left(self.tokens, stop))

    def add_to(self, tile: Tensor, start: int) -> None:
        """Add those whose token lies in this tile, which begins at token `start`."""
        mine = self.within(start, start + len(tile))
        if mine.start < mine.stop:
            place = (self.token[mine] - start, self.column[mine])
            tile.index_put_(place, self.value[mine].to(tile.dtype), accumulate=True)


class ColumnBlock:
    """Columns [a, b) of the edges, as many as one first sweep takes; their hidden states go to x [width, H]."""

    def __init__(self, edges: EdgeColumns, a: int, b: int, x: Tensor, scratch: Scratch) -> None:
        self.edges, self.head, self.a, self.b, self.scratch = edges, edges.head, a, b, scratch
        self.x, self.width, device = x, len(x), x.device
        for part in slices(b - a, GATHERED):
            x[: b - a][part] = edges.hidden[edges.rows[a:b][part]]
        x[b - a :] = 0
        self.shift = torch.zeros(self.width, dtype=edges.wide, device=device)
        self.shift[: b - a] = edges.shift[a:b]
        nowhere = torch.full((b - a,), -torch.inf, dtype=edges.wide, device=device)
        column = torch.arange(b - a, device=device)
        self.without_target = Marks(edges.target[edges.first[a:b]], column, nowhere)

    def shifted_logits(
        self, weight: Tensor, out: Tensor, start: int, shift: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(z - shift, slope of the cap) of the tokens from `start` on; `out` is overwritten and may be it."""
        head, wide, capped = self.head, self.edges.wide, self.head.softcap is not None
        z = out if out.dtype == wide else self.scratch.view("z", len(out), self.width, wide)
        if weight.dtype == wide:
            torch.mm(weight, self.x.T, out=z)
        else:
            torch.mm(weight, self.x.T, out=out)
            lost = self.scratch.view("lost", len(out), self.width, out.dtype)
            torch.addmm(out, weight, self.x.T, beta=-1, out=lost)
            z.copy_(out).add_(lost)
        # Without a cap the shift is taken off first, in the units of the product; with one only from the capped
        # logit.
        if not capped:
            z -= shift / head.scale
        if head.bias is not None:
            z += head.bias[start : start + len(out), None]
        if head.scale != 1:
            z *= head.scale
        z, slope = head.cap_(z)
        return (z.sub_(shift) if capped else z), slope

    def exponentials(self, weight: Tensor, out: Tensor, start: int, sums: ColumnSums | None = None) -> Tensor:
        """e[v], 0 at the columns' targets, times the slope of the cap, into `out`; adds to `sums`.

        weight: the head's rows from `start` on, in the dtype of the products, as are the e[v] that are returned.
        """
        z, slope = self.shifted_logits(weight, out, start, self.shift)
        self.without_target.add_to(z, start)
        if sums is None:
            z.exp_()
        else:
            self._add_up(z, sums)
        if slope is not None:
            z *= slope
        if z is not out:
            out.copy_(z)
        return z if z.dtype == weight.dtype else out

    def _add_up(self, z: Tensor, sums: ColumnSums) -> None:
        """Turn shifted logits into exponentials, and add both to the sums."""
        again = self.scratch.view("again", len(z), self.width, z.dtype)
        if sums.above is not None:
            # Written as numbers: torch sums booleans six times as slowly. A tile's count is exact in float32.
            sums.above += torch.gt(z, 0, out=again).sum(0).long()
        if sums.moments is None:
            sums.e += z.exp_().sum(0)
            return
        torch.clamp(z, min=NOTHING, out=again)  # 0·−∞ would be NaN
        sums.e += z.exp_().sum(0)
        sums.moments += again.mul_(z).sum(0)

    def first_sweep(self, tiles: list[tuple[int, Tensor]], *, product: bool) -> Tensor | None:
        """Fill the tiles and compute log p; returns Σ e[v]·W[v] [width, H] with `product`."""
        sums, total = self._sums(tiles, product, self.edges.ranks)
        far = (~(sums.e[: self.b - self.a] <= HUGE_SUM)).nonzero()[:, 0]  # NaN as well
        # The target's logit was the shift, so others may have overflowed. Shifted by the maximum none can; it isn't
        # the first choice, since it costs a pass over the logits.
        if len(far):
            self.shift[far] = self.edges.highest_logits(far + self.a).to(self.shift.dtype)
            above = sums.above  # counted at the target
            sums, total = self._sums(tiles, product, ranks=False)
            sums.above = above
        self.edges.set_sums(self.a, self.b, self.shift, sums)
        return total

    def _sums(
        self, tiles: list[tuple[int, Tensor]], product: bool, ranks: bool
    ) -> tuple[ColumnSums, Tensor | None]:
        wide, sums = self.edges.wide, self.edges.new_sums(self.width, ranks=ranks)
        total = self.scratch.view("total", self.width, self.x.shape[1], wide).zero_() if product else None
        for start, tile in tiles:
            weight = self.scratch.cast(
                "weight", self.head.weight[start : start + len(tile)], self.edges.products
            )
            e = self.exponentials(weight, tile, start, sums)
            if total is None:
                continue
            # In the products' own precision the sum grows in place. Narrower products, and those of few columns, are
            # made apart and added in float32.
            if weight.dtype == wide and self.width > FEW_COLUMNS:
                total.addmm_(e.T, weight)
                continue
            part = self.scratch.view("part", self.width, weight.shape[1], weight.dtype)
            for rows in slices(len(weight), TERMS_AT_ONCE if self.width <= FEW_COLUMNS else len(weight)):
                total += torch.mm(e[rows].T, weight[rows], out=part)
        return sums, total


def as_tile(flat: Tensor, height: int, width: int, thin: bool) -> Tensor:
    """The beginning of a flat tensor as a tile [height, width]; a thin one lies column by column."""
    used = flat[: height * width]
    return used.view(width, height).T if thin else used.view(height, width)
