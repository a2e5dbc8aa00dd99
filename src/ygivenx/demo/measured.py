"""What the demo measures of a model, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from ..scores.ledger import Ledger
from ..sequence import Example


@dataclass(frozen=True)
class MeasuredState:
    """A model's behaviour on the held-out rows: exact match, nats per token, and the first row's ledger."""

    exact_match: float
    conditional_nats: float
    marginal_nats: float
    generated: list[str]
    ledger: Ledger


@dataclass(frozen=True)
class Arm:
    """One fine-tune: before, after, and what was logged on the way."""

    before: MeasuredState
    after: MeasuredState
    history: list[dict[str, float]]
    examples: list[Example]
    ledgers: list[Ledger]
    seconds: float
