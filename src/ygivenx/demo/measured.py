"""What the demo measures of a model, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..scores.ledger import Ledger
from ..sequence import Example

# What is shown of a state: label, field, format, sign.
MEASURES = (
    ("exact match", "exact_match", ".0%", 1),
    ("log Pr(y|x), nats/token", "conditional_nats", ".4f", -1),
    ("log Pr(x), nats/token", "marginal_nats", ".4f", -1),
)


@dataclass(frozen=True)
class MeasuredState:
    """A model's behaviour on the held-out rows: exact match, nats per token, and the first row's ledger."""

    exact_match: float
    conditional_nats: float
    marginal_nats: float
    generated: list[str]
    ledger: Ledger

    def __str__(self) -> str:
        return ", ".join(
            f"{label} {sign * getattr(self, name):{form}}" for label, name, form, sign in MEASURES
        )


@dataclass(frozen=True)
class Arm:
    """One fine-tune: before, after, and what was logged on the way."""

    before: MeasuredState
    after: MeasuredState
    history: list[dict[str, float]]
    examples: list[Example]
    ledgers: list[Ledger]
    seconds: float

    def numbers(self) -> dict[str, Any]:
        """The figures of one arm, as result.json has them."""
        states = {"before": self.before, "after": self.after}
        figures = {f"{m[1]}_{when}": getattr(s, m[1]) for when, s in states.items() for m in MEASURES}
        return figures | {"seconds": self.seconds}


def comparison(arms: dict[str, Arm]) -> Iterator[list[str]]:
    """Loss on y only beside loss on all tokens: a line of names, then one for each measure."""
    states = [arms["y"].before, *(arm.after for arm in arms.values())]
    yield ["", "before", *(f"after, loss on {name}" for name in arms)]
    for label, name, form, sign in MEASURES:
        yield [label, *(format(sign * getattr(s, name), form) for s in states)]
