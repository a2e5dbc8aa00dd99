"""What a page is made of: plain records that know nothing of models, so that anything can fill them.

Numbers may be Python's or NumPy's. NaN and None mean "no value" everywhere (the first token of a text has no
probability); infinities are kept and shown as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """One line. Curves of the same `chart` (its title, with the unit) share axes. x and y have one length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    chart: str = "Nats per token"
    x_label: str = "step"

    def __post_init__(self) -> None:
        _same_length(f"curve {self.name!r}", x=self.x, y=self.y)


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """Sums over the tokens of one kind of segment: `log_p` in nats, `share` of the weighted loss (0 to 1)."""

    kind: str
    tokens: int
    weight: float
    log_p: float
    nats_per_token: float
    share: float


@dataclass(frozen=True)
class LedgerTable:
    """A ledger: anything with LedgerRow's fields as `rows`; `facts` are named results printed below it."""

    title: str
    rows: Sequence[Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, ledger: Any, title: str) -> LedgerTable:
        """From a `ygivenx.Ledger`: its rows, and how marginal, conditional and joint add up."""
        facts = {
            "log Pr(x)": ledger.marginal,
            "log Pr(y|x)": ledger.conditional,
            "log Pr([x, y])": ledger.joint,
            "log Pr(y|x) by difference": ledger.conditional_by_difference,
            "the two routes differ by": ledger.difference,
        }
        return cls(title, ledger.rows, facts, (verdict_of(ledger), *ledger.notes))


def verdict_of(ledger: Any) -> str:
    """Whether a `ygivenx.Ledger` adds up, and within how many nats that is asked."""
    verdict = "it adds up" if ledger.balanced else "IT DOESN'T ADD UP"
    return f"{verdict}, within {ledger.tolerance:.1e} nats"


@dataclass(frozen=True)
class TokenStrip:
    """A sequence, token by token; all lists have one length.

    weights: as targets. log_p: nats, None or NaN where there is none. kinds: the segment kind of each token.
    ids: vocabulary ids, or empty. notes: what a reader has to know. fields: named texts shown with the row
    (prompt, generated, expected).
    """

    title: str
    tokens: Sequence[str]
    weights: Sequence[float]
    log_p: Sequence[float | None]
    kinds: Sequence[str]
    ids: Sequence[int] = ()
    notes: Sequence[str] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {"tokens": self.tokens, "weights": self.weights, "log_p": self.log_p, "kinds": self.kinds}
        if len(self.ids):
            columns["ids"] = self.ids
        _same_length(f"token strip {self.title!r}", **columns)

    @classmethod
    def of(
        cls, sequence: Any, log_p: Any = None, *, title: str, fields: Mapping[str, Any] | None = None
    ) -> TokenStrip:
        """From a `ygivenx.Sequence`, with the log p of each of its tokens where they were computed."""
        count = len(sequence)
        kinds = ["token"] * count
        for s in sequence.segments:
            kinds[s.start : s.stop] = [s.kind] * (s.stop - s.start)
        return cls(
            title=title,
            tokens=sequence.tokens or [str(i) for i in sequence.ids],
            weights=sequence.weights,
            log_p=[None] * count if log_p is None else log_p,
            kinds=kinds,
            ids=sequence.ids,
            notes=sequence.notes,
            fields=fields or {},
        )


@dataclass(frozen=True)
class Finding:
    """What an audit rule found. A page takes any object or mapping with these names.

    severity: "error", "warning" or "info". share: of the rows or tokens that the rule looked at, 0 to 1.
    examples: texts, or mappings of names to values (such as where, text).
    """

    rule: str
    severity: str
    message: str
    count: int | None = None
    share: float | None = None
    examples: Sequence[Any] = ()
    why: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Table:
    """Any table; numbers are set right-aligned, the first column is the row's name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {i} has {len(row)} cells, expected {len(self.columns)}"
                )


def _same_length(what: str, **columns: Sequence[Any]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{what}: one length expected, got {lengths}")


def plain(value: Any, lost: Callable[[float], Any] = lambda number: None) -> Any:
    """`value` in JSON's types, inside too: `lost` of a number that isn't finite, its text where it is unknown."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, lost) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), lost)
    if isinstance(value, list | tuple):
        return [plain(v, lost) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return lost(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
