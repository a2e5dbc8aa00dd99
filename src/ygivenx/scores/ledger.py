"""The ledger: where the log-probability of a sequence goes, and the check that it adds up to the joint.

Equals `ygivenx.reference.score` for a pair, up to the rounding of the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..choices import Route
from ..objective import as_forest
from ..report.parts import LedgerRow
from ..sequence import Example, Sequence
from .node_log_probs import node_log_probs

if TYPE_CHECKING:
    from torch import nn

# |joint − marginal − conditional| per |joint|, by dtype: two forward passes round differently.
RELATIVE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Ledger:
    """A table by kind of segment whose rows add up to the joint, log Pr([x, y]), in nats.

    conditional: Σ log p over the tokens that the model has to produce (direct, from one forward pass).
    conditional_by_difference: Σ over turns of joint − marginal, each from a forward pass of its own prefix.
    log_p: per token, float64 [T], NaN for a first token, which has no context. `sequences`: what was read.
    """

    rows: tuple[LedgerRow, ...]
    total: LedgerRow
    joint: float
    marginal: float
    conditional: float
    conditional_by_difference: float
    tolerance: float
    sequences: tuple[Sequence, ...]
    log_p: tuple[np.ndarray, ...]
    notes: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """|direct conditional − conditional by difference|, nats."""
        return _distance(self.conditional, self.conditional_by_difference)

    @property
    def balanced(self) -> bool:
        """Whether the rows add up to the joint and both routes to the conditional agree."""
        rows = math.fsum(r.log_p for r in self.rows)
        return _distance(rows, self.joint) <= self.tolerance and self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "rows": [asdict(r) for r in self.rows],
            "total": asdict(self.total),
            "joint": self.joint,
            "marginal": self.marginal,
            "conditional": self.conditional,
            "conditional_by_difference": self.conditional_by_difference,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "balanced": self.balanced,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        head = f"{'segment':<14}{'tokens':>8}{'weight':>10}{'Σ log p':>13}{'nats/token':>12}{'share':>8}"
        lines = [head, "─" * len(head)]
        for r in (*self.rows, self.total):
            lines.append(
                f"{r.kind:<14}{r.tokens:>8}{r.weight:>10g}{r.log_p:>13.4f}{r.nats_per_token:>12.4f}{r.share:>8.1%}"
            )
        sign = "=" if self.balanced else "≠"
        lines += [
            f"log Pr(x) {self.marginal:.4f} + log Pr(y|x) {self.conditional:.4f} "
            f"{sign} log Pr([x,y]) {self.joint:.4f}",
            f"log Pr(y|x) by difference {self.conditional_by_difference:.4f}, "
            f"off by {self.difference:.1e} (tolerance {self.tolerance:.1e}) nats",
            *(f"note: {n}" for n in self.notes),
        ]
        return "\n".join(lines)


def ledger(
    model: nn.Module, example: Example | Sequence | Iterable[Sequence], *, route: Route = "auto"
) -> Ledger:
    """The ledger of an example under a model. `model` should be in eval mode (dropout makes sums differ).

    The first token of a sequence has no probability without a BOS before it: sums start at the second, and a
    note says so. route: see `hidden_states`.
    """
    sequences = (example,) if isinstance(example, Sequence) else tuple(example)
    log_p = _log_p(model, sequences, route)
    whole = np.concatenate(log_p)
    outputs = [s.output for s in sequences]
    output = np.concatenate(outputs)
    joint = float(np.nansum(whole))
    conditional = float(np.nansum(whole[output]))
    by_difference = math.fsum(
        _by_difference(model, s, mask, route) for s, mask in zip(sequences, outputs, strict=True)
    )
    dtype = next(model.parameters()).dtype
    rows, total = _rows(sequences, log_p)
    return Ledger(
        rows=tuple(rows),
        total=total,
        joint=joint,
        marginal=float(np.nansum(whole[~output])),
        conditional=conditional,
        conditional_by_difference=by_difference,
        tolerance=RELATIVE_TOLERANCE[dtype] * max(1.0, abs(joint) if math.isfinite(joint) else 0.0),
        sequences=sequences,
        log_p=tuple(log_p),
        notes=_notes(sequences, joint),
    )


@dataclass(frozen=True, slots=True)
class Check:
    """Whether a joint and a marginal can belong to one model; `conditional` = joint − marginal, nats."""

    possible: bool
    conditional: float
    explanation: str

    def __bool__(self) -> bool:
        return self.possible

    def __str__(self) -> str:
        return self.explanation


def check(joint: float, marginal: float, *, tolerance: float = 0.0) -> Check:
    """Can log Pr([x, y]) = `joint` and log Pr(x) = `marginal` (nats) hold together?

    [x, y] begins with x, so each time a model writes [x, y] it has written x: Pr([x, y]) ≤ Pr(x) ≤ 1, and
    log Pr(y|x) = joint − marginal ≤ 0 (chain rule). `tolerance` (nats) allows for rounding.
    """
    for name, value in (("joint", joint), ("marginal", marginal)):
        if math.isnan(value) or value > tolerance:
            return Check(
                False,
                joint - marginal,
                f"impossible: the {name} is {value:g}, and a log-probability is at most 0.",
            )
    # −inf − (−inf) says nothing: an impossible x leaves every y undefined.
    if joint == marginal == -math.inf:
        return Check(True, math.nan, "possible, but log Pr(y|x) is undefined: Pr(x) = 0.")
    conditional = joint - marginal
    if conditional > tolerance:
        return Check(
            False,
            conditional,
            f"impossible: log Pr([x,y]) = {joint:g} is above log Pr(x) = {marginal:g}. [x,y] begins with x, "
            f"so it can't be more probable than x; here log Pr(y|x) would be {conditional:+g}, a probability of "
            f"{math.exp(min(conditional, 700)):.3g}. The two numbers come from different texts, "
            "tokenisations or models, or one of them is a mean per token where the other is a sum.",
        )
    return Check(
        True,
        conditional,
        f"possible: log Pr(y|x) = {joint:g} − ({marginal:g}) = {conditional:g}. The joint is at most the "
        "marginal; each further token adds a term ≤ 0, so a joint far below the marginal is the normal case.",
    )


def _distance(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b)  # −∞ is where −∞ is


def _log_p(model: nn.Module, sequences: tuple[Sequence, ...], route: Route) -> list[np.ndarray]:
    forest = as_forest(sequences)
    by_node = node_log_probs(model, forest, route=route)
    return [by_node[path] for path in forest.paths]


def _by_difference(model: nn.Module, s: Sequence, output: np.ndarray, route: Route) -> float:
    """Σ over runs [a, b) of y: log Pr(ids[:b]) − log Pr(ids[:a]), each from a forward pass of its own."""
    # Where y begins and ends, in turn: a0, b0, a1, b1, ...
    edges = np.flatnonzero(np.diff(np.concatenate(([False], output, [False])).astype(np.int8)))
    prefixes = [_joint(model, s, int(n), route) for n in edges]
    return math.fsum(b - a for a, b in zip(prefixes[::2], prefixes[1::2], strict=True))


def _joint(model: nn.Module, s: Sequence, stop: int, route: Route) -> float:
    if stop < 2:
        return 0.0
    prefix = Sequence(s.ids[:stop], np.zeros(stop, np.float32))
    return float(np.nansum(_log_p(model, (prefix,), route)[0]))


def _kinds(s: Sequence) -> np.ndarray:
    if not s.segments:
        return np.where(s.weights > 0, "y", "x")
    return np.array([g.kind for g in s.segments for _ in range(g.start, g.stop)])


def _rows(sequences: tuple[Sequence, ...], log_p: list[np.ndarray]) -> tuple[list[LedgerRow], LedgerRow]:
    """A row per kind of segment in order of appearance, and their total."""
    kinds = np.concatenate([_kinds(s) for s in sequences])
    weights = np.concatenate([s.weights for s in sequences]).astype(np.float64)
    values = np.concatenate(log_p)
    # Without a weight not even −∞ has a part.
    weighted = np.multiply(weights, values, where=weights > 0, out=np.zeros_like(values))
    loss = -float(np.nansum(weighted))

    def row(kind: str, at: np.ndarray) -> LedgerRow:
        counted = int((~np.isnan(values[at])).sum())
        total = float(np.nansum(values[at]))
        part = -float(np.nansum(weighted[at])) + 0.0  # + 0.0: no −0 in print
        return LedgerRow(
            kind=kind,
            tokens=int(at.sum()),
            weight=float(weights[at].sum()),
            log_p=total,
            nats_per_token=-total / counted if counted else 0.0,
            share=_share(part, loss),
        )

    rows = [row(kind, kinds == kind) for kind in dict.fromkeys(kinds.tolist())]
    return rows, row("total", np.ones(len(kinds), bool))


def _share(part: float, whole: float) -> float:
    # −∞ of −∞ is all of it; any finite part beside it is nothing.
    if math.isinf(whole):
        return float(part == whole)
    return part / whole if whole else 0.0


def _notes(sequences: tuple[Sequence, ...], joint: float) -> tuple[str, ...]:
    notes = ["the first token has no context: log Pr(x) is conditional on it"]
    if joint == -math.inf:
        notes.append("the model gives a token probability 0: a difference of −∞ and −∞ says nothing")
    if len(sequences) > 1:
        notes.append(f"{len(sequences)} sequences, one per turn: their sums are added up")
    return (*notes, *dict.fromkeys(n for s in sequences for n in s.notes))
