"""The demo's page: curves of marginal and conditional, ledgers before and after, ten held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report import LedgerTable, Page, Table, TokenStrip, curves, made_by
from .measured import MEASURES, Arm, comparison

LOGGED = ("eval_conditional_nats", "eval_marginal_nats")


def write_page(path: Path, arms: dict[str, Arm], result: dict[str, Any]) -> None:
    """One static file from what the arms measured."""
    y = arms["y"]
    page = Page(
        title="ygivenx demo",
        subtitle="SmolLM2-135M-Instruct learns to extract an order as JSON, with the loss on y only",
        verdict=f"exact match on held-out orders: {y.before.exact_match:.0%} → {y.after.exact_match:.0%}",
        summary={
            **{
                f"{label}, {when}": format(sign * getattr(state, name), form)
                for label, name, form, sign in MEASURES
                for when, state in (("before", y.before), ("after", y.after))
            },
            "wall seconds": result["wall_seconds"],
        },
        ledgers=[
            LedgerTable.of(y.before.ledger, "a held-out row, before training"),
            LedgerTable.of(y.after.ledger, "the same row, after training"),
        ],
        rows=list(_strips(y)),
        about=made_by(),
    )
    for name, arm in arms.items():
        suffix = "" if len(arms) == 1 else f" (loss on {name})"
        page.curves += curves(arm.history, suffix=suffix, names=LOGGED)
    if len(arms) > 1:
        names, *rows = comparison(arms)
        page.tables.append(Table("Loss on y only beside loss on all tokens", names, rows))
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
