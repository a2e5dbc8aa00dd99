"""The demo's page: curves of marginal and conditional, ledgers before and after, ten held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import LedgerTable, Page, Table, TokenStrip, curves

if TYPE_CHECKING:
    from .measured import Arm

LOGGED = ("eval_conditional_nats", "eval_marginal_nats")


def write_page(path: Path, arms: dict[str, Arm], result: dict[str, Any]) -> None:
    """One static file from what the arms measured."""
    y = arms["y"]
    page = Page(
        title="ygivenx demo",
        subtitle="SmolLM2-135M-Instruct learns to extract an order as JSON, with the loss on y only",
        summary={
            "exact match before": f"{y.before.exact_match:.0%}",
            "exact match after": f"{y.after.exact_match:.0%}",
            "log Pr(y|x) per token, before": -y.before.conditional_nats,
            "log Pr(y|x) per token, after": -y.after.conditional_nats,
            "log Pr(x) per token, before": -y.before.marginal_nats,
            "log Pr(x) per token, after": -y.after.marginal_nats,
            "wall seconds": result["wall_seconds"],
        },
        ledgers=[
            LedgerTable.of(y.before.ledger, "a held-out row, before training"),
            LedgerTable.of(y.after.ledger, "the same row, after training"),
        ],
        rows=list(_strips(y)),
    )
    for name, arm in arms.items():
        suffix = "" if len(arms) == 1 else f" (loss on {name})"
        page.curves += curves(arm.history, suffix=suffix, names=LOGGED)
    if len(arms) > 1:
        page.tables.append(_comparison(arms))
    page.write(path)


def _strips(arm: Arm) -> list[TokenStrip]:
    texts = zip(arm.examples, arm.ledgers, arm.before.generated, arm.after.generated, strict=False)
    return [
        TokenStrip.of(
            example.only,
            book.log_p[0],
            title=f"held-out row {i}",
            fields={"generated before": before, "generated after": after},
        )
        for i, (example, book, before, after) in enumerate(texts)
    ]


def _comparison(arms: dict[str, Arm]) -> Table:
    states = [arms["y"].before, *(arm.after for arm in arms.values())]
    rows = [
        ["exact match", *(s.exact_match for s in states)],
        ["log Pr(y|x), nats/token", *(-s.conditional_nats for s in states)],
        ["log Pr(x), nats/token", *(-s.marginal_nats for s in states)],
    ]
    columns = ["", "before", *(f"after, loss on {name}" for name in arms)]
    return Table("Loss on y only beside loss on all tokens", columns, rows)
