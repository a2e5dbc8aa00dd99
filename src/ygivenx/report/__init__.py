"""The page: ledgers, token strips, findings and curves as one static HTML file that touches no network."""

from .page import Page, made_by
from .parts import Curve, Finding, LedgerRow, LedgerTable, Table, TokenStrip
from .runs import curves, run_page

__all__ = [
    "Curve",
    "Finding",
    "LedgerRow",
    "LedgerTable",
    "Page",
    "Table",
    "TokenStrip",
    "curves",
    "made_by",
    "run_page",
]
