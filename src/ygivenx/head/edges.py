"""The edges of one call to the head, grouped in columns: the small vectors beside the tiles of `tiled.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .logit_head import LogitHead

GATHERED = 128  # edges, or tokens of the vocabulary, that are gathered at a time
PAD = 16  # columns come in multiples of this: the products run on whole vectors


NOTHING = -200.0  # a logit so far below a shift has no part in a sum: its exponential is 0 in float32


@dataclass
class ColumnSums:
    """Sums by column over the tokens other than its target: e (S), e·(z − shift), and how many z lie above it.

    float64, float64 and int64 [C]; the last two only for whoever asks for entropies and ranks.
    """

    e: Tensor
    moments: Tensor | None = None
    above: Tensor | None = None


class EdgeColumns:
    """Edges in the order of their columns, and what is known of each column.

    target [E]; weight, picked (the target's logit), log_p float64 [E]; column [E] of each edge, `starts` [C + 1] of
    each column's edges, the first of which has the highest logit: its target is *the* target of the column.
    rows [C]; shift, sums (S), moments (Σ e·(z − shift)) float64 [C]; above int64 [C]. Ranks count logits above the
    shift: with them each edge is a column of its own.
    """

    def __init__(self, hidden: Tensor, head: LogitHead, rows: Tensor, targets: Tensor, weights: Tensor | None, *,
                 z_loss: float = 0.0, ranks: bool = False, entropy: bool = False) -> None:  # fmt: skip
        self.hidden, self.head, self.z_loss, self.ranks, self.entropy = hidden, head, z_loss, ranks, entropy
        self.wide = torch.promote_types(head.weight.dtype, torch.float32)
        self.products = product_dtype(head.weight)
        picked, slope = self._pick(rows, targets)
        # By row, the highest logit first.
        self.order = torch.argsort(picked, descending=True)
        self.order = self.order[torch.argsort(rows[self.order], stable=True)]
        rows, self.target, self.picked = rows[self.order], targets[self.order], picked[self.order]
        self.slope = None if slope is None else slope[self.order]
        self.set_weights(weights)
        if ranks:
            self.rows, self.column = rows, torch.arange(len(rows), device=rows.device)
            counts = torch.ones_like(rows)
        else:
            self.rows, self.column, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0)
        self.starts, self.first = [0, *ends.tolist()], ends - counts
        self.shift = self.picked[self.first]
        self.sums = torch.zeros_like(self.shift)
        self.moments = torch.zeros_like(self.shift)
        self.above = torch.zeros_like(self.rows)
        self.log_z = torch.zeros_like(self.shift)
        self.log_p = torch.zeros_like(self.picked)

    def _pick(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logit of every edge's target and the slope of its cap, float64 [E]."""
        picked = torch.empty(len(rows), dtype=self.wide, device=rows.device)
        for part in gather_slices(len(rows), rows.device):
            h, w = self.hidden[rows[part]], self.head.weight[targets[part]]
            picked[part] = (h.to(self.wide) * w.to(self.wide)).sum(-1)
        if self.head.bias is not None:
            picked += self.head.bias[targets]
        return self.head.cap_(picked.double() * self.head.scale)

    def set_weights(self, weights: Tensor | None) -> None:
        """The weights of the edges, in the caller's order, which gradients need."""
        self.weight = None if weights is None else weights[self.order].double()

    def new_sums(self, width: int, *, ranks: bool) -> ColumnSums:
        """Zeros for so many columns."""
        e = torch.zeros(width, dtype=torch.float64, device=self.rows.device)
        moments = torch.zeros_like(e) if self.entropy else None
        return ColumnSums(e, moments, torch.zeros_like(e, dtype=torch.int64) if ranks else None)

    def in_input_order(self, values: Tensor) -> Tensor:
        """Values per edge in the caller's order."""
        out = torch.empty_like(values)
        out[self.order] = values
        return out

    def set_sums(self, a: int, b: int, shift: Tensor, sums: ColumnSums) -> None:
        """Store the sums of columns [a, b), at least [b - a] each, and compute their log Z and log p."""
        self.shift[a:b], self.sums[a:b] = shift[: b - a], sums.e[: b - a]
        if sums.above is not None:
            self.above[a:b] = sums.above[: b - a]
        if sums.moments is not None:
            self.moments[a:b] = sums.moments[: b - a]
        mine = slice(self.starts[a], self.starts[b])
        shift, column = self.shift[a:b], self.column[mine] - a
        # log1p(S), as e[target] is exp(0) unless the shift is the maximum
        log_z = torch.log1p(self.sums[a:b] + torch.expm1(self.picked[self.first[a:b]] - shift))
        self.log_p[mine] = self.picked[mine] - shift[column] - log_z[column]
        self.log_z[a:b] = log_z

    def entropies(self) -> Tensor:
        """−Σ p·log p of each column's distribution, nats, float64 [C]; 0·log 0 counts as 0."""
        # log p(v) = z[v] − shift − log Z, so the entropy is log Z less the mean of z − shift, whose term of the
        # target isn't among the sums.
        target = self.picked[self.first] - self.shift
        mean = (self.moments + target.exp() * target.clamp_min(NOTHING)) / self.log_z.exp()
        return self.log_z - mean

    def highest_logits(self, columns: Tensor) -> Tensor:
        """The highest logit of each of these columns, float64."""
        x = self.hidden[self.rows[columns]].to(self.wide)
        maxima = []
        for part in slices(len(self.head.weight), GATHERED):
            z = x @ self.head.weight[part].to(self.wide).T
            if self.head.bias is not None:
                z += self.head.bias[part]
            maxima.append(self.head.cap_(z * self.head.scale)[0].amax(1))
        return torch.stack(maxima).amax(0).double()

    def loss(self) -> Tensor:
        """Σ w·(−log p + z_loss·logsumexp²), float64."""
        assert self.weight is not None
        lse = (self.shift + self.log_z)[self.column]
        return (self.weight * (self.z_loss * lse**2 - self.log_p)).sum()

    def coefficients(self, a: int, b: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Columns [a, b): k·scale [b - a], and of their edges the gradient g at the target's logit less what k·e[v]
        gives already (nothing at *the* target, whose e is left out of the tiles), float64; and (token, column, g / k),
        what the tiles hold there besides.
        """
        assert self.weight is not None
        mine = slice(self.starts[a], self.starts[b])
        column, first, weight = self.column[mine] - a, self.first[a:b], self.weight[mine]
        at_first = self.target[mine] == self.target[first][column]
        on_target = torch.zeros(b - a, dtype=weight.dtype, device=weight.device)
        elsewhere = on_target.index_add(0, column, weight.where(~at_first, 0.0))
        size = on_target.index_add(0, column, weight.abs())
        on_target = on_target.index_add(0, column, weight.where(at_first, 0.0))
        lse_part = 2 * self.z_loss * (on_target + elsewhere)
        if self.z_loss:
            lse_part = lse_part * (self.shift[a:b] + self.log_z[a:b])
        # The gradient at logit v is c·p(v) less the weights of the edges to v, with p(v) = e[v] / Z.
        c = on_target + elsewhere + lse_part
        z = self.log_z[a:b].exp()
        # At *the* target p = 1 - S / Z, so c·p - on_target is this: no difference of two numbers that are nearly
        # equal.
        at_target = elsewhere + lse_part - c * self.sums[a:b] / z
        g = -weight.where(~at_first, 0.0)
        g[first - self.starts[a]] = at_target
        if self.slope is not None:
            g = g * self.slope[mine]
        # Weights that cancel leave c = 0, and tiles can't hold g / k: any c too small to matter will do.
        c = torch.where(c.abs() < 1e-12 * size, 1e-12 * size, c)
        k = c / z
        held = torch.where(k[column] == 0, 0.0, g / k[column])
        return k * self.head.scale, g, (self.target[mine], column, held)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What tiles are multiplied in: float32 for float16, which can't hold unnormalised exponentials, and for bfloat16
    on a CPU that has no products for it and would take up to a hundred times as long.
    """
    slow = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not has_products(weight.dtype)
    return torch.float32 if slow or weight.dtype == torch.float16 else weight.dtype


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether torch has products in this dtype for this CPU; 16 bits may go element by element."""
    probes = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in probes or bool(getattr(torch.ops.mkldnn, probes[dtype], bool)())


def slices(count: int, most: int) -> list[slice]:
    """[0, count) in slices of at most `most`."""
    return [slice(a, a + most) for a in range(0, count, most)]


def gather_slices(count: int, device: torch.device) -> list[slice]:
    """Slices of the edges whose rows are gathered at once: [E, H] would be large, and on a GPU many steps slow."""
    return slices(count, GATHERED if device.type == "cpu" else 32 * GATHERED)


def even_spans(a: int, b: int, most: int, unit: int = PAD) -> list[tuple[int, int]]:
    """[a, b) in as few parts of at most `most` as possible, about equal and, but for the last, whole units."""
    if a == b:
        return []
    # [0, 1000) in parts of at most 400 is [0, 336), [336, 672), [672, 1000): three parts are needed, of 334, in units
    # of 16.
    size = padded(-(-(b - a) // -(-(b - a) // most)), unit)
    return [(c, min(c + size, b)) for c in range(a, b, size)]


def padded(columns: int, unit: int = PAD) -> int:
    return -(-columns // unit) * unit
