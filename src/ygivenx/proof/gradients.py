"""From a gradient back to the loss: which token was the target of a row, and with what weight.

A loss that is a weighted sum of cross-entropies has, at the logits z of one row,

    ∂L/∂z = W·softmax(z) − Σ w(v)·onehot(v),  W = Σ w(v)

(derivative of the log-softmax), so every entry but the targets' is W·p, and what is missing there is w.
At the head's input h, with z = h·Uᵀ, the same row reads ∂L/∂h = Σ w(v)·(Σ p·U − U[v]): the target is the
token whose direction explains the gradient, its weight the length along it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..head.logit_head import LogitHead

CHUNK = 64  # rows at a time: [CHUNK, vocabulary] in float64
LOGITS_AT_A_TIME = 1 << 27  # in the model's own precision
MAX_TARGETS = 16  # more targets than this in one row is a distillation, not a cross-entropy

# How far an entry may lie from W·p, relative to p + 1/V, before it counts as a target: rounding of the logits
# and of the loss's own softmax stays far below.
OUTLIER = {torch.float64: 1e-5, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# The share of a row's gradient off W·p, its largest entry apart, from which label smoothing is looked for.
BEND = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
RATHER_SURE = 0.5  # 1 − p of the most probable token below which p − 1 has lost digits
# The share of a row's gradient at the head's input that its targets may leave unexplained.
UNEXPLAINED = {torch.float64: 1e-5, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1.5e-1}
# A row that a weighted cross-entropy leaves unexplained by more than this carries another term.
FOREIGN_TERM = 0.3


class RecoveredTarget(NamedTuple):
    """One target: `row` of the input, token id, weight, log p of the target before the update (nats).

    A row whose gradient is another term and no cross-entropy has one entry: target −1, weight 0, log p NaN.
    smoothing: the label smoothing ε of its row. residual: the share of the row's gradient that a weighted
    cross-entropy doesn't explain (0 to about 1).
    """

    row: int
    target: int
    weight: float
    log_p: float
    smoothing: float
    residual: float


@dataclass(frozen=True)
class ProbedHead(LogitHead):
    """A logit head as a loss may have used it.

    rounded: the dtype that autocast rounds products to, None without. unadapted: the weight without the adapter that
    is on the head, None without one.
    """

    rounded: torch.dtype | None = None
    unadapted: Tensor | None = None


def from_logits(raw: Tensor, grad: Tensor, head: ProbedHead) -> list[RecoveredTarget]:
    """Targets of each row of a head's output. raw, grad [n, V]; rows with a zero gradient have none."""
    found: list[RecoveredTarget] = []
    rows = grad.ne(0).any(1).nonzero().flatten()
    for chunk in rows.split(CHUNK):
        z, slope = head.from_product(raw[chunk].double())
        # A saturated soft cap has lost the digits of its gradient: expect no more of it than it has.
        rounding = 8 * torch.finfo(raw.dtype).eps * head.scale / slope
        found += _solve_logits(chunk, z, grad[chunk].double() / slope, raw.dtype, rounding)
    return found


def _solve_logits(
    rows: Tensor, z: Tensor, g: Tensor, dtype: torch.dtype, rounding: Tensor | float
) -> list[RecoveredTarget]:
    vocab = z.shape[1]
    log_p = z.log_softmax(1)
    p = log_p.exp()
    mass, smoothing, excess = _explain(g, p, BEND[dtype])
    # W itself may be 0, where positive and negative weights cancel: then the largest entry gives the scale.
    unit = torch.maximum(mass.abs(), g.abs().amax(1))[:, None]
    targets = excess.abs() > (OUTLIER[dtype] + rounding) * unit * (p + 1 / vocab)
    # A loss on everything (distillation) has no sparse targets: keep the entry that is pushed up most, if it
    # explains the row.
    targets[targets.sum(1) > MAX_TARGETS] = False
    empty = ~targets.any(1)
    targets[empty, g[empty].argmin(1)] = True
    total = g.abs().sum(1)
    unexplained = (excess.abs() * ~targets).sum(1) / total
    # Σ ∂L/∂z = W - Σ w = 0 for any weighted cross-entropy: what doesn't add up to 0 is another term.
    unbalanced = g.sum(1).abs() / unit[:, 0]
    residual = torch.maximum(unexplained, unbalanced)
    # Smoothing takes ε of a target's weight and spreads it over the vocabulary.
    weights = -excess / (1 - smoothing)[:, None]
    at, target = targets.nonzero(as_tuple=True)
    solved = torch.stack([target.double(), weights[at, target], log_p[at, target]])
    none = torch.tensor([-1, 0, math.nan], dtype=solved.dtype, device=solved.device)[:, None]
    target, weight, value = torch.where((empty & (residual > FOREIGN_TERM))[at], none, solved)
    columns = (rows[at], target.long(), weight, value, smoothing[at], residual[at])
    return [RecoveredTarget(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]


def _explain(g: Tensor, p: Tensor, bend: float) -> tuple[Tensor, Tensor, Tensor]:
    """(W, ε, g − W·(p − ε/V)) per row: the part of the gradient that pushes all tokens down alike.

    Few entries are targets, so the median of g/p over the most probable tokens is W whatever the targets
    are. Label smoothing adds −W·ε/V everywhere, which a line through the non-targets finds.
    """
    vocab = p.shape[1]
    likely, where = p.topk(min(vocab, 128), 1)
    # 128 entries with at most 16 targets among them: the median is never a target's.
    mass = (g.gather(1, where) / likely).nan_to_num().median(1).values
    excess = g - mass[:, None] * p
    smoothing = torch.zeros_like(mass)
    # One target explains the largest entry; only what is left beyond it speaks for smoothing.
    spread = excess.abs().sum(1) - excess.abs().amax(1)
    bent = (spread > bend * g.abs().sum(1)).nonzero().flatten()
    if not len(bent):
        return mass, smoothing, excess
    g, p = g[bent], p[bent]
    # A smoothed row's target is off the line: it is off most, is pushed up most, or is sure of itself.
    suspects = (excess[bent].abs().argmax(1), g.argmin(1), p.argmax(1))
    lines = [_line(g, p, suspect) for suspect in suspects]
    misfits = torch.stack([line.misfit for line in lines])
    chosen = misfits.argmin(0)
    # A line has two parameters where W·p has one, so it fits better in any case: only a tenfold gain counts.
    better = misfits.amin(0) < 0.1 * spread[bent]
    for i, line in enumerate(lines):
        use = better & (chosen == i)
        mass[bent[use]], excess[bent[use]] = line.slope[use], line.excess[use]
        smoothing[bent[use]] = (-line.offset * vocab / line.slope)[use].clamp(0, 0.999)
    return mass, smoothing, excess


class _Line(NamedTuple):
    slope: Tensor
    offset: Tensor
    excess: Tensor
    misfit: Tensor


def _line(g: Tensor, p: Tensor, without: Tensor) -> _Line:
    """Least squares g = slope·p + offset over all entries but one per row, weighted by 1/(p + 1/V)²."""
    # Errors are relative to p + 1/V, as in OUTLIER: otherwise the few probable tokens alone would decide.
    omega = (p + 1 / p.shape[1]) ** -2
    omega.scatter_(1, without[:, None], 0)
    omega /= omega.sum(1, keepdim=True)
    p_mean, g_mean = (omega * p).sum(1), (omega * g).sum(1)
    # The textbook's slope, covariance over variance, with these weights.
    centred = p - p_mean[:, None]
    slope = (omega * centred * (g - g_mean[:, None])).sum(1) / (omega * centred**2).sum(1)
    offset = g_mean - slope * p_mean
    excess = g - slope[:, None] * p - offset[:, None]
    misfit = excess.abs().scatter(1, without[:, None], 0).sum(1)
    return _Line(slope, offset, excess, misfit)


def from_hidden(hidden: Tensor, grad: Tensor, head: ProbedHead, hints: Tensor) -> list[RecoveredTarget]:
    """Targets of each row of the head's input, for losses that never show their logits.

    hidden, grad [n, H]; hints int64 [n]: the token that wins where two explain a gradient equally well
    (rows of the head's matrix that are equal), −1 for none.
    """
    readings: dict[
        torch.dtype, list[list[RecoveredTarget]]
    ] = {}  # by how the logits may have been rounded; one list a row
    norms = head.weight.detach().float().pow(2).sum(1)
    # Logits of as many rows at once as the loss is likely to have made: other shapes round otherwise.
    for block in torch.arange(len(grad)).split(max(CHUNK, LOGITS_AT_A_TIME // len(norms))):
        rows = block[grad[block].ne(0).any(1).cpu()].to(grad.device)
        raws = _logits(hidden[block.to(grad.device)], head) if len(rows) else {}
        for dtype, raw in raws.items():
            for chunk in rows.split(CHUNK):
                solved = _solve_hidden(raw[chunk - block[0]].double(), grad[chunk], head, norms, hints[chunk])
                readings.setdefault(dtype, []).extend(
                    [f._replace(row=row) for f in targets]
                    for row, targets in zip(chunk.tolist(), solved, strict=True)
                )
    return [f for targets in min(readings.values(), key=_misfit, default=[]) for f in targets]


def _misfit(reading: list[list[RecoveredTarget]]) -> float:
    """How badly a reading explains the rows of a pass: the sum of log residuals.

    Fused losses differ in whether a half-precision head's logits are rounded, but one loss treats all of its
    rows alike. By a single row the choice would go wrong where both explain it almost equally well.
    """
    return math.fsum(math.log(targets[0].residual + 1e-12) for targets in reading)


def _logits(x: Tensor, head: ProbedHead) -> dict[torch.dtype, Tensor]:
    """What the head's module would give, in its own precision, autocast's and, where that is a half, in float32."""
    weight = head.weight.detach()
    own = (weight.dtype, torch.promote_types(weight.dtype, torch.float32))
    dtypes = dict.fromkeys(d for d in (head.rounded, *own) if d is not None)
    return {
        d: x.to(d) @ weight.to(d).T + (0 if head.bias is None else head.bias.detach().to(d)) for d in dtypes
    }


def _solve_hidden(
    raw: Tensor, grad: Tensor, head: ProbedHead, norms: Tensor, hint: Tensor
) -> list[list[RecoveredTarget]]:
    z, slope = head.from_product(raw)
    log_p = z.log_softmax(1)
    rows = _Directions(log_p, slope * torch.ones_like(z), head.weight.detach())
    g = grad.double()
    # Beside the eight best by a float32 estimate: the most probable token, whose direction is known exactly, and the
    # one that the text has next.
    candidates = torch.cat([rows.shortlist(g, norms), rows.top[:, None], hint.clamp(min=0)[:, None]], 1)
    weights, residuals, misfits = rows.fit(g, candidates)
    # Where p − 1 has lost its digits, what lies along the target's row says nothing.
    dtypes = (grad.dtype, head.weight.dtype, head.rounded)
    misfits[rows.rest < 64 * max(torch.finfo(d).eps for d in dtypes if d is not None)] = 0
    residuals[:, -1] = torch.where(hint < 0, torch.inf, residuals[:, -1])
    best = residuals.argmin(1)
    # Equal rows of the head's matrix explain a gradient equally well: the next token is the likelier reading.
    tied = residuals[:, -1] <= 1.5 * residuals.gather(1, best[:, None])[:, 0]
    best[tied] = candidates.shape[1] - 1
    limit = max(UNEXPLAINED[d] for d in (grad.dtype, head.rounded) if d is not None)
    found = []
    for i, b in enumerate(best.tolist()):
        picks = [(int(candidates[i, b]), float(weights[i, b]))]
        residual, misfit = float(residuals[i, b]), float(misfits[i, b])
        if residual > limit or misfit > FOREIGN_TERM:
            several, left = rows.pursue(i, g[i], limit)
            if left <= limit:
                picks, residual = several, left
            elif max(residual, misfit) > FOREIGN_TERM:
                found.append([RecoveredTarget(i, -1, 0.0, math.nan, 0.0, max(residual, misfit))])
                continue
        found.append([RecoveredTarget(i, t, w, float(log_p[i, t]), 0.0, residual) for t, w in picks])
    return found


class _Directions:
    """d(t) = Σ p·s·U − s[t]·U[t] of one chunk of rows: where target t pushes the head's input."""

    def __init__(self, log_p: Tensor, slope: Tensor, weight: Tensor) -> None:
        self.weight, self.slope = weight, slope
        p = log_p.exp()
        self.top = p.argmax(1)
        self.p_top = p.gather(1, self.top[:, None])[:, 0]
        others = p.scatter(1, self.top[:, None], 0)
        self.rest = others.sum(1)  # 1 − p(top) without cancellation
        self.others = ((others * slope).float() @ weight.float()).double()

    def mean(self) -> Tensor:
        """Σ p·s·U, float64 [n, H]."""
        top_slope = self.slope.gather(1, self.top[:, None])
        return self.others + self.p_top[:, None] * top_slope * self.weight[self.top].double()

    def of(self, tokens: Tensor) -> Tensor:
        """float64 [n, C, H] for tokens [n, C]; exact for a confident top token too."""
        scaled = self.slope.gather(1, tokens)[..., None] * self.weight[tokens].double()
        confident = self.others[:, None] - self.rest[:, None, None] * scaled
        is_top = (tokens == self.top[:, None])[..., None]
        return torch.where(is_top, confident, self.mean()[:, None] - scaled)

    def shortlist(self, g: Tensor, norms: Tensor, size: int = 8) -> Tensor:
        """The tokens [n, size] whose directions explain most of g, in float32."""
        mean = self.mean()
        slope = self.slope.float()
        # g·d(t) and ‖d(t)‖² for all tokens by two products, without making [V, H] directions: gain is the squared
        # length of g along d(t).
        along = (g * mean).sum(1, keepdim=True).float() - slope * (g.float() @ self.weight.float().T)
        length = mean.pow(2).sum(1, keepdim=True).float() + slope**2 * norms
        length -= 2 * slope * (mean.float() @ self.weight.float().T)
        gain = along**2 / length.clamp(min=1e-6 * float(norms.mean()))
        return gain.topk(min(size, gain.shape[1]), 1).indices

    def fit(self, g: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, ‖g − w·d‖/‖g‖ off the target's own row where that is left out, the same in all) [n, C]."""
        d = self.of(tokens)
        # Where 1 − p cancels, the loss's own rounding of p − 1 lies along the target's row: leave that
        # direction out, and the weight comes from the other tokens.
        likely = (tokens == self.top[:, None]) & (self.rest < RATHER_SURE)[:, None]
        along = self.weight[tokens].double() * likely[..., None]
        along = along / along.norm(dim=2, keepdim=True).clamp(min=1e-300)
        free, rest = (v - (v * along).sum(2, keepdim=True) * along for v in (d, g[:, None]))
        w = (free * rest).sum(2) / free.pow(2).sum(2).clamp(min=1e-300)
        size = g.norm(dim=1, keepdim=True)
        residual = (rest - w[..., None] * free).norm(dim=2) / size
        return w, residual, (g[:, None] - w[..., None] * d).norm(dim=2) / size

    def pursue(self, i: int, g: Tensor, limit: float) -> tuple[list[tuple[int, float]], float]:
        """Several targets of row i, by orthogonal matching pursuit (Pati et al. 1993)."""
        every = torch.arange(self.weight.shape[0])[None]
        chosen: list[int] = []
        weights, residual = torch.zeros(0), g
        # Rare, and for one row: here all directions are made.
        directions = self.mean()[i] - self.slope[i][:, None] * self.weight.double()
        lengths = directions.norm(dim=1).clamp(min=1e-12)
        for _ in range(min(MAX_TARGETS, every.shape[1])):
            chosen.append(int(((directions @ residual).abs() / lengths).argmax()))
            basis = directions[chosen].T
            weights = torch.linalg.lstsq(basis, g[:, None]).solution[:, 0]
            residual = g - basis @ weights
            if residual.norm() <= limit * g.norm():
                break
        return list(zip(chosen, weights.tolist(), strict=True)), float(residual.norm() / g.norm())
