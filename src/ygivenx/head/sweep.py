"""The sweeps behind `head.py`: softmax statistics, log p and both gradients, a tile of the vocabulary at a time.

Columns are the rows of hidden states that carry an edge. Tiles are [tokens of the vocabulary, columns], so that
statistics run along the columns. The logit of a column's target is the shift s of its exponentials

    e[v] = exp(z[v] - s),  S = sum of e[v] over v other than the target,  Z = S + e[target]
    log p(target) = -log(1 + S),   1 - p(target) = S / Z

so that nothing is lost to rounding where p is close to 1, and no pass looks for a maximum. Only a column whose
other logits lie far above its target's (S > HUGE) is done again, shifted by its maximum.

The gradient at logit v is k·e[v] with k = c / Z and c = Σw (1 + 2·z_loss·logsumexp), but for the targets' own
terms. The factor k goes to the other side of the products, so exponentials meet the head as they are:

    first sweep    e, S and Σ e[v]·W[v], while the tile of W is in the cache
    second sweep   dW[v] = Σ e[v, column]·(k·h)[column], each tile written once

In between the exponentials wait in the memory of dW itself: tile i in the place of tile i - 1, and the second
sweep goes backwards. That holds as many columns as H. What is beyond is computed again (bfloat16, where adding to
a rounded dW would lose digits, and large vocabularies) or waits in working memory and adds to dW (float32).

A bfloat16 logit is the product rounded to bfloat16 plus what that rounding left over, from a second product:
softmax sees float32, as the sums do. `kernel.py` makes the same tile of exponentials at once, where it can.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import kernel, pages
from .edges import Edges, Head, parts, working_dtype

MEMORY = 64 << 20  # bytes beyond the gradients that a call may hold on to
HUGE = 1e20
BLOCK = 1024  # columns of one first sweep
TILE = 2 << 20  # elements of one tile
PAD = 16  # columns come in multiples of this: the products run on whole vectors
WORTHWHILE = 160  # columns from which adding to dW is cheaper than computing the logits again


@dataclass(frozen=True)
class Swept:
    """log_p [E]; rank int64 [E] if asked for; loss scalar; gradients where they were wanted."""

    log_p: Tensor
    rank: Tensor | None
    loss: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def sweep(
    hidden: Tensor,
    head: Head,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    wants: tuple[bool, bool, bool] = (False, False, False),
    *,
    ranks: bool = False,
    memory: int = MEMORY,
) -> Swept:
    """log p of every edge; with `weights` the loss and the wanted gradients (of hidden, weight, bias)."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _sweep(hidden, head, rows, targets, weights, wants, ranks, memory)


def _sweep(
    hidden: Tensor,
    head: Head,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    wants: tuple[bool, bool, bool],
    ranks: bool,
    memory: int,
) -> Swept:
    given = head.weight.dtype
    head = replace(head, weight=head.weight.to(working_dtype(hidden, head.weight)))
    edges = Edges(hidden, head, rows, targets, weights, apart=ranks)
    into = _Gradients(hidden, head, edges.wide, wants)
    scratch = _Scratch(hidden.device)
    if into.weight is not None and not len(rows):
        into.weight.zero_()
    for a, b, room in _rounds(len(edges.rows), head.weight, memory if wants[1] else 0):
        _Round(edges, a, b, room, into, scratch).sweep(ranks=ranks)
    return Swept(
        edges.as_given(edges.log_p).to(edges.wide),
        edges.as_given(edges.above[edges.column]) if ranks else None,
        None if weights is None else edges.loss().to(edges.wide),
        into.hidden,
        None if into.weight is None else into.weight.to(given),
        None if into.bias is None or head.bias is None else into.bias.to(head.bias.dtype),
    )


class _Gradients:
    """Where the gradients go; None for those that nobody wants."""

    def __init__(self, hidden: Tensor, head: Head, wide: torch.dtype, wants: tuple[bool, bool, bool]) -> None:
        device = hidden.device
        self.hidden = torch.zeros_like(hidden) if wants[0] else None
        self.weight = pages.empty(head.weight.shape, head.weight.dtype, device) if wants[1] else None
        self.bias = torch.zeros(len(head.weight), dtype=wide, device=device) if wants[2] else None


class _Scratch:
    """Working memory that every tile uses again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat: dict[str, Tensor] = {}

    def view(self, name: str, height: int, width: int, dtype: torch.dtype) -> Tensor:
        flat = self.flat.get(name)
        if flat is None or len(flat) < height * width:
            flat = self.flat[name] = pages.empty((height * width,), dtype, self.device)
        return flat[: height * width].view(height, width)


class _Marks:
    """Values to be added to single elements of the tiles: (token, column, value), in order of token."""

    def __init__(self, token: Tensor, column: Tensor, value: Tensor) -> None:
        order = torch.argsort(token)
        self.token, self.column, self.value = token[order], column[order], value[order]
        self.tokens: list[int] = self.token.tolist()

    def within(self, start: int, stop: int) -> slice:
        return slice(bisect_left(self.tokens, start), bisect_left(self.tokens, stop))

    def add_to(self, tile: Tensor, start: int) -> None:
        """Adds those whose token lies in this tile, which begins at token `start`."""
        mine = self.within(start, start + len(tile))
        if mine.start < mine.stop:
            place = (self.token[mine] - start, self.column[mine])
            tile.index_put_(place, self.value[mine].to(tile.dtype), accumulate=True)


class _Block:
    """Columns [a, b) of the edges: as many as one first sweep takes."""

    def __init__(self, edges: Edges, a: int, b: int, scratch: _Scratch) -> None:
        self.edges, self.head, self.a, self.b, self.scratch = edges, edges.head, a, b, scratch
        self.width = _padded(b - a)
        weight, device = self.head.weight, edges.hidden.device
        self.x = torch.zeros(self.width, weight.shape[1], dtype=weight.dtype, device=device)
        self.x[: b - a] = edges.hidden[edges.rows[a:b]]
        self.shift = torch.zeros(self.width, dtype=edges.wide, device=device)
        self.shift[: b - a] = edges.shift[a:b]
        nowhere = torch.full((b - a,), -torch.inf, dtype=edges.wide, device=device)
        column = torch.arange(b - a, device=device)
        self.without_target = _Marks(edges.target[edges.first[a:b]], column, nowhere)
        compiled = self.head.softcap is None and kernel.usable(weight)
        self.packed = kernel.Packed(self.x) if compiled else None

    def shifted_logits(self, out: Tensor, start: int, shift: Tensor) -> tuple[Tensor, Tensor | None]:
        """(z - shift, slope of the cap) of the tokens from `start` on; `out` is overwritten and may be it."""
        head, wide = self.head, self.edges.wide
        weight = head.weight[start : start + len(out)]
        torch.mm(weight, self.x.T, out=out)
        capped = head.softcap is not None
        z = out
        if out.dtype != wide:
            lost = self.scratch.view("lost", len(out), self.width, out.dtype)
            torch.addmm(out, weight, self.x.T, beta=-1, out=lost)
            z = self.scratch.view("z", len(out), self.width, wide).copy_(out)
            z += lost
        if not capped:
            z -= shift / head.scale
        if head.bias is not None:
            z += head.bias[start : start + len(out), None]
        if head.scale != 1:
            z *= head.scale
        z, slope = head.capped(z)
        return (z.sub_(shift) if capped else z), slope

    def exponentials(
        self, out: Tensor, start: int, sums: Tensor | None = None, above: Tensor | None = None
    ) -> None:
        """e[v], 0 at the columns' targets, times the slope of the cap, into `out`; adds to S and to the rank."""
        if self.packed is not None:
            self._compiled_exponentials(self.packed, out, start, sums, above)
            return
        z, slope = self.shifted_logits(out, start, self.shift)
        self.without_target.add_to(z, start)
        if above is not None:
            # Written as numbers: torch sums booleans six times as slowly. A tile's count is exact in float32.
            higher = torch.gt(z, 0, out=self.scratch.view("higher", len(z), self.width, z.dtype))
            above += higher.sum(0).long()
        z.exp_()
        if sums is not None:
            sums += z.sum(0)
        if slope is not None:
            z *= slope
        if z is not out:
            out.copy_(z)

    def _compiled_exponentials(
        self, packed: kernel.Packed, out: Tensor, start: int, sums: Tensor | None, above: Tensor | None
    ) -> None:
        stop = start + len(out)
        marks, mine = self.without_target, self.without_target.within(start, stop)
        bias = None if self.head.bias is None else self.head.bias[start:stop].float()
        packed.exponentials(
            self.head.weight[start:stop], out, self.shift, bias, self.head.scale,
            (marks.token[mine] - start, marks.column[mine]),
            torch.zeros(self.width, dtype=torch.float64) if sums is None else sums,
            torch.zeros(self.width, dtype=torch.int64) if above is None else above,
        )  # fmt: skip

    def first_sweep(self, tiles: list[tuple[int, Tensor]], *, product: bool, ranks: bool) -> Tensor | None:
        """Fills the tiles, settles log p, and gives Σ e[v]·W[v] [width, H] if that is asked for."""
        sums, above, total = self._first_sweep(tiles, product, ranks)
        far = ~(sums <= HUGE)  # NaN as well
        if far[: self.b - self.a].any():
            self.shift = torch.where(far, self._maximum(tiles), self.shift)
            sums, _, total = self._first_sweep(
                tiles, product, ranks=False
            )  # ranks were counted at the target
        edges, n = self.edges, self.b - self.a
        edges.shift[self.a : self.b] = self.shift[:n]
        edges.sums[self.a : self.b] = sums[:n]
        if above is not None:
            edges.above[self.a : self.b] = above[:n]
        edges.settle(self.a, self.b)
        return total

    def _first_sweep(
        self, tiles: list[tuple[int, Tensor]], product: bool, ranks: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        device, wide = self.x.device, self.edges.wide
        sums = torch.zeros(self.width, dtype=torch.float64, device=device)
        above = torch.zeros(self.width, dtype=torch.int64, device=device) if ranks else None
        total = torch.zeros(self.x.shape, dtype=wide, device=device) if product else None
        for start, tile in tiles:
            self.exponentials(tile, start, sums, above)
            if total is not None:
                weight = self.head.weight[start : start + len(tile)]
                if weight.dtype == wide:
                    total.addmm_(tile.T, weight)
                else:
                    part = self.scratch.view("part", self.width, weight.shape[1], weight.dtype)
                    total += torch.mm(tile.T, weight, out=part)
        return sums, above, total

    def _maximum(self, tiles: list[tuple[int, Tensor]]) -> Tensor:
        highest = torch.full_like(self.shift, -torch.inf)
        for start, tile in tiles:
            z, _ = self.shifted_logits(tile, start, torch.zeros_like(highest))
            highest = torch.maximum(highest, z.amax(0))
        return highest


class _Round:
    """Columns [a, b) of the edges, whose share of dW is made together; `room` of them can wait."""

    def __init__(self, edges: Edges, a: int, b: int, room: int, into: _Gradients, scratch: _Scratch) -> None:
        self.edges, self.into, self.scratch = edges, into, scratch
        self.weight, self.adds = edges.head.weight, a > 0
        self.kept = min(room, _padded(b - a))
        middle = min(a + self.kept, b)
        self.spans = [*_even(a, middle, BLOCK), *_even(middle, b, BLOCK)]
        widths = [_padded(d - c) for c, d in self.spans]
        self.width = sum(widths)
        self.step = _height(max(self.kept, *widths), 512)
        self.starts = range(0, len(self.weight), self.step)
        self.waiting = self._waiting() if self.kept else []
        self.again: list[tuple[int, _Block]] = []  # blocks that couldn't wait, and their first column
        self.factor = torch.zeros(self.width, dtype=edges.wide, device=self.weight.device)
        self.scaled_x = torch.empty(self.width, self.weight.shape[1], dtype=self.weight.dtype,
                                    device=self.weight.device) if into.weight is not None else None  # fmt: skip
        self.marks: list[tuple[Tensor, Tensor, Tensor]] = []

    def _waiting(self) -> list[Tensor]:
        """The places of the exponentials, one [tokens, kept] per tile."""
        heights = [min(self.step, len(self.weight) - start) for start in self.starts]
        if self.adds:
            own = self.scratch.view("waiting", len(self.weight), self.kept, self.weight.dtype)
            return [own[start : start + n] for start, n in zip(self.starts, heights, strict=True)]
        assert self.into.weight is not None
        spare = self.scratch.view("spare", heights[0], self.kept, self.weight.dtype)
        places = [spare, *(self.into.weight[start : start + self.step] for start in self.starts[:-1])]
        return [p.view(-1)[: n * self.kept].view(n, self.kept) for p, n in zip(places, heights, strict=True)]

    def sweep(self, *, ranks: bool) -> None:
        """Both sweeps; the second one only for dW and the bias."""
        at = 0
        for a, b in self.spans:
            block = _Block(self.edges, a, b, self.scratch)
            kept = at + block.width <= self.kept
            tiles = [(start, self._place(i, at, block.width, kept)) for i, start in enumerate(self.starts)]
            total = block.first_sweep(tiles, product=self.into.hidden is not None, ranks=ranks)
            if self.edges.weight is not None:
                self._settle(block, at, total)
            if not kept:
                self.again.append((at, block))
            at += block.width
        if self.into.weight is not None or self.into.bias is not None:
            self._second_sweep()

    def _place(self, i: int, at: int, width: int, kept: bool) -> Tensor:
        if kept:
            return self.waiting[i][:, at : at + width]
        height = min(self.step, len(self.weight) - self.starts[i])
        return self.scratch.view("tile", height, width, self.weight.dtype)

    def _settle(self, block: _Block, at: int, total: Tensor | None) -> None:
        """Once a block's statistics are known: its share of dH, and what its share of dW needs."""
        edges, a, b = self.edges, block.a, block.b
        mine, scale = slice(edges.starts[a], edges.starts[b]), edges.head.scale
        k, g = edges.coefficients(a, b)
        column, target = edges.column[mine] - a, edges.target[mine]
        self.factor[at : at + b - a] = k * scale
        factor = self.factor[at : at + block.width, None]
        held = torch.where(k[column] == 0, 0.0, g / k[column])
        self.marks.append((target, column + at, held))
        if self.scaled_x is not None:
            self.scaled_x[at : at + block.width] = block.x * factor
        if total is not None and self.into.hidden is not None:
            total *= factor
            for part in parts(len(target)):
                terms = self.weight[target[part]] * (g[part] * scale).to(total.dtype)[:, None]
                total.index_add_(0, column[part], terms)
            self.into.hidden[edges.rows[a:b]] = total[: b - a].to(self.into.hidden.dtype)

    def _second_sweep(self) -> None:
        into = self.into
        marks = _Marks(*(torch.cat(parts) for parts in zip(*self.marks, strict=True)))
        step = _height(self.width, 256) if self.again else self.step
        for i, first in reversed(list(enumerate(self.starts))):
            last = min(first + self.step, len(self.weight))
            for start in range(first, last, step):
                tile = self._complete(i, start - first, min(step, last - start))
                marks.add_to(tile, start)
                if into.bias is not None:
                    into.bias[start : start + len(tile)] += tile.to(self.factor.dtype) @ self.factor
                if into.weight is None or self.scaled_x is None:
                    continue
                out = into.weight[start : start + len(tile)]
                torch.addmm(out, tile, self.scaled_x, beta=int(self.adds), out=out)

    def _complete(self, i: int, skip: int, height: int) -> Tensor:
        """Exponentials of all columns for `height` tokens of tile i, from its token `skip` on."""
        kept = self.waiting[i][skip : skip + height] if self.kept else None
        if not self.again:
            assert kept is not None
            return kept
        tile = self.scratch.view("complete", height, self.width, self.weight.dtype)
        if kept is not None:
            tile[:, : self.kept] = kept
        for at, block in self.again:
            block.exponentials(tile[:, at : at + block.width], self.starts[i] + skip)
        return tile


def _rounds(columns: int, weight: Tensor, memory: int) -> list[tuple[int, int, int]]:
    """[a, b) and how many of its columns can wait: at first in dW, then in most of `memory`."""
    room = weight.shape[1] // PAD * PAD if memory else 0
    later = memory * 11 // 16 // (len(weight) * weight.element_size()) // PAD * PAD
    if columns <= room or weight.dtype == torch.bfloat16 or later < WORTHWHILE or not room:
        return [(0, columns, room)] if columns else []
    return [(0, room, room), *((a, b, later) for a, b in _even(room, columns, later))]


def _even(a: int, b: int, most: int) -> list[tuple[int, int]]:
    """[a, b) in as few parts of at most `most` as possible, about equal and, but for the last, whole PADs."""
    if a == b:
        return []
    size = _padded(-(-(b - a) // -(-(b - a) // most)))
    return [(c, min(c + size, b)) for c in range(a, b, size)]


def _padded(columns: int) -> int:
    return -(-columns // PAD) * PAD


def _height(width: int, least: int) -> int:
    """Tokens of a tile of so many columns."""
    return min(8192, max(least, TILE // width // 256 * 256))
