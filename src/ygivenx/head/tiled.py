"""The route on a CPU: softmax sums, log p and both gradients, a tile of the vocabulary at a time.

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

On a GPU, `full_vocab.py` takes the whole vocabulary at once. Where the compiled kernel runs, `fused.py` computes e
twice and keeps none. Here, in plain torch, the exponentials wait in the memory of dW itself: tile i in the place of
tile i - 1, and the second sweep goes backwards. That holds as many columns as H, but not in float16. What is
beyond is computed again (16 bits, and large vocabularies) or waits in working memory (float32).
Columns come in rounds whose rows fit into that memory, and each round after the first adds to dW.
Where one round holds all columns, the second sweep may also come much later, when weights are known in a backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused, kernel
from .edges import PAD, EdgeColumns, even_spans, padded, product_dtype
from .gradients import Gradients
from .tiles import ColumnBlock, Marks, Scratch, as_tile

MEMORY_BYTES = 64 << 20  # beyond the gradients, that a call may hold on to
# Sizes measured with `benchmarks/head.py`; results don't depend on them beyond rounding.
BLOCK_COLUMNS = 1024  # of one first sweep
TOTAL_BYTES = 8 << 20  # of Σ e[v]·W[v] in one first sweep: it has to stay in the cache
TILE_ELEMENTS = 2 << 20
# up to so many, float32 tiles lie column by column, unpadded: few columns multiply faster so
THIN_COLUMNS = 128
WAITING_COLUMNS = 160  # from so many on, adding to dW costs less than computing the logits again


def run_tiled(edges: EdgeColumns, into: Gradients, memory: int) -> TiledRound | None:
    """Compute the sums of `edges` and add the gradients to `into`; by the compiled kernel where that is faster.

    Without weights a round is returned, if it holds whatever the gradients take: they need no logits then.
    """
    head = edges.head
    rounds = _rounds(len(edges.rows), head.weight, memory if into.weight is not None else 0)
    # What comes first decides whether the kernel is built at all.
    if (head.weight.dtype == torch.bfloat16 or not _mostly_wait(rounds)) and kernel.usable(head):
        fused.run_fused(edges, into, memory)
        return None
    scratch = Scratch(edges.hidden.device)
    for a, b, room in rounds:
        tiled = TiledRound(edges, a, b, room, into, scratch)
        tiled.first_sweep()
        if edges.weight is not None:
            tiled.second_sweep()
        elif len(rounds) == 1 and into.needed and not tiled.recomputed:
            scratch.flat.clear()  # but for what the round itself refers to
            return tiled
    return None


class TiledRound:
    """Columns [a, b) of the edges, whose share of dW is made together; `room` of them can wait."""

    def __init__(
        self, edges: EdgeColumns, a: int, b: int, room: int, into: Gradients, scratch: Scratch
    ) -> None:
        self.edges, self.into, self.scratch = edges, into, scratch
        self.weight, self.adds, self.products = edges.head.weight, a > 0, edges.products
        self.thin = b - a <= THIN_COLUMNS and self.weight.dtype == self.products != torch.bfloat16
        self.kept = min(room, self._wide(b - a))
        # Blocks end where waiting ends, so that each of them either waits whole or is computed again whole.
        middle = min(a + self.kept, b)
        block = min(
            BLOCK_COLUMNS, max(1, TOTAL_BYTES // (edges.wide.itemsize * self.weight.shape[1]) // PAD) * PAD
        )
        self.spans = [*even_spans(a, middle, block), *even_spans(middle, b, block)]
        widths = [self._wide(d - c) for c, d in self.spans]
        self.width = sum(widths)
        # Where they aren't of the products' dtype, tiles of the head and of its gradient are copied.
        self.copied = 0 if self.weight.dtype == self.products else 2 * self.weight.shape[1]
        self.step = _height(max(self.kept, self.copied, *widths), 512)
        self.starts = range(0, len(self.weight), self.step)
        self.waiting = self._waiting() if self.kept else []
        self.recomputed: list[
            tuple[int, ColumnBlock]
        ] = []  # blocks that couldn't wait, and their first column
        self.factor = torch.zeros(self.width, dtype=edges.wide, device=self.weight.device)
        self.scaled_x = self._buffer("scaled x", self.width) if into.weight is not None else None
        self.marks: list[tuple[Tensor, Tensor, Tensor]] = []
        self.held: list[tuple[ColumnBlock, int, Tensor | None]] = []  # until there are weights

    def _buffer(self, name: str, columns: int) -> Tensor:
        return self.scratch.view(name, columns, self.weight.shape[1], self.products)

    def _wide(self, columns: int) -> int:
        return columns if self.thin else padded(columns)

    def _waiting(self) -> list[Tensor]:
        """The places of the exponentials, one [tokens, kept] per tile."""
        heights = [min(self.step, len(self.weight) - start) for start in self.starts]
        if self.adds:
            own = self.scratch.view("waiting", len(self.weight), self.kept, self.weight.dtype, thin=self.thin)
            return [own[start : start + n] for start, n in zip(self.starts, heights, strict=True)]
        assert self.into.weight is not None
        spare = self.scratch.view("waiting", heights[0], self.kept, self.weight.dtype)
        places = [spare, *(self.into.weight[start : start + self.step] for start in self.starts[:-1])]
        return [as_tile(p.view(-1), n, self.kept, self.thin) for p, n in zip(places, heights, strict=True)]

    def first_sweep(self) -> None:
        """The sums of all columns, and with weights dH."""
        at = 0
        for a, b in self.spans:
            kept = at + self._wide(b - a) <= self.kept
            block = ColumnBlock(self.edges, a, b, self._rows(at, self._wide(b - a), kept), self.scratch)
            tiles = [(start, self._place(i, at, block.width, kept)) for i, start in enumerate(self.starts)]
            total = block.first_sweep(tiles, product=self.into.hidden is not None)
            if self.edges.weight is not None:
                self._add_gradients(block, at, total)
            elif self.into.needed:  # the next block overwrites its total
                self.held.append((block, at, None if total is None else total.clone()))
            if not kept and self.into.second_sweep:
                self.recomputed.append((at, block))
            at += block.width

    def add_gradients(self, weights: Tensor) -> None:
        """The gradients for weights [E] that came after the first sweep, in the caller's order; once."""
        self.edges.set_weights(weights)
        for block, at, total in self.held:
            self._add_gradients(block, at, total)
        self.second_sweep()

    def _rows(self, at: int, width: int, kept: bool) -> Tensor:
        """Where x of a block goes. What waits needs it no longer once it is scaled: it becomes that in its place."""
        if kept and self.scaled_x is not None:
            return self.scaled_x[at : at + width]
        if not self.into.second_sweep:
            return self._buffer("x", width)
        return self._buffer("x", self.width - self.kept)[at - self.kept :][:width]

    def _place(self, i: int, at: int, width: int, kept: bool) -> Tensor:
        if kept:
            return self.waiting[i][:, at : at + width]
        height = min(self.step, len(self.weight) - self.starts[i])
        return self.scratch.view("tile", height, width, self.products, thin=self.thin)

    def _add_gradients(self, block: ColumnBlock, at: int, total: Tensor | None) -> None:
        """Add a block's share to dH, and keep what its share of dW needs."""
        a, b = block.a, block.b
        factor, g, marks = self.edges.coefficients(a, b)
        self.factor[at : at + b - a] = factor
        self.marks.append((marks[0], marks[1] + at, marks[2]))
        if self.scaled_x is not None:
            scaled = self.scaled_x[at : at + block.width]
            torch.mul(block.x, self.factor[at : at + block.width, None], out=scaled)
        self.into.add_hidden(self.edges, a, b, factor, g, total)

    def second_sweep(self) -> None:
        """dW and the bias's gradient, for whoever needs them."""
        into = self.into
        if not into.second_sweep:
            return
        marks = Marks(*(torch.cat(parts) for parts in zip(*self.marks, strict=True)))
        # Tiles that are completed are as wide as all columns, so they are lower than those of the first sweep.
        step = _height(max(self.width, self.copied), 256) if self.recomputed else self.step
        # Backwards: tile i waits in the place of dW's tile i - 1. From the end on, no tile of dW is written before
        # the exponentials in its place have been used.
        for i, first in reversed(list(enumerate(self.starts))):
            last = min(first + self.step, len(self.weight))
            for start in range(first, last, step):
                tile = self._complete(i, start - first, min(step, last - start))
                marks.add_to(tile, start)
                if into.bias is not None:
                    into.bias[start : start + len(tile)] += tile.to(self.factor.dtype) @ self.factor
                if into.weight is not None and self.scaled_x is not None:
                    self._add(tile, self.scaled_x, into.weight[start : start + len(tile)])

    def _add(self, tile: Tensor, scaled_x: Tensor, out: Tensor) -> None:
        """The tile's share of dW: written in the first round, then added."""
        if out.dtype == self.products:
            torch.addmm(out, tile, scaled_x, beta=int(self.adds), out=out)
            return
        share = torch.mm(
            tile, scaled_x, out=self.scratch.view("share", len(out), out.shape[1], self.products)
        )
        out.copy_(share.add_(out) if self.adds else share)

    def _complete(self, i: int, skip: int, height: int) -> Tensor:
        """Exponentials of all columns for `height` tokens of tile i, from its token `skip` on."""
        kept = self.waiting[i][skip : skip + height] if self.kept else None
        if not self.recomputed:
            assert kept is not None
            return self.scratch.cast("tile", kept, self.products)
        tile, start = self.scratch.view("tile", height, self.width, self.products), self.starts[i] + skip
        if kept is not None:
            tile[:, : self.kept] = kept
        weight = self.scratch.cast("weight", self.weight[start : start + height], self.products)
        for at, block in self.recomputed:
            block.exponentials(weight, tile[:, at : at + block.width], start)
        return tile


def _mostly_wait(rounds: list[tuple[int, int, int]]) -> bool:
    """Whether few exponentials are computed twice: in float32 three products and a part cost less than the kernel."""
    return sum(b - a for a, b, _ in rounds) <= 2 * sum(room for *_, room in rounds)


def _rounds(columns: int, weight: Tensor, memory: int) -> list[tuple[int, int, int]]:
    """[a, b) and how many of its columns can wait: at first in dW, later in most of `memory` or not at all.

    What doesn't wait keeps x beside factor·x; either way they fill a quarter of `memory` at most.
    """
    if not columns or not memory:
        return [(0, columns, 0)] if columns else []
    tokens, row = len(weight) * weight.element_size(), weight.shape[1] * product_dtype(weight).itemsize
    # Of `memory` a quarter is for hidden states. A column that doesn't wait holds two rows of it, x and factor·x; one
    # that does has x scaled in its place, so that one is enough.
    most = memory // 4 // row
    fits = max(PAD, most // 2 // PAD * PAD)
    room = 0 if weight.dtype == torch.float16 else min(weight.shape[1], max(PAD, most)) // PAD * PAD
    # In later rounds dW is taken: a column that waits needs memory for V exponentials beside its rows of hidden
    # states.
    later = memory * 3 // 4 // (tokens + 3 * row) // PAD * PAD
    wait = room and weight.element_size() > 2 and later >= WAITING_COLUMNS
    first = min(columns, room if wait else max(room, fits))
    rest = even_spans(first, columns, later if wait else fits)
    return [(0, first, room), *((a, b, later if wait else 0) for a, b in rest)]


def _height(width: int, least: int) -> int:
    """Tokens of a tile of so many columns."""
    return max(least, TILE_ELEMENTS // width // 256 * 256)
