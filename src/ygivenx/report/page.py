"""From parts to one HTML file: style, script and data inlined, everything else forbidden by its own CSP.

Data never becomes markup: it travels as JSON without `<`, `>` or `&` in an inert script block, and page.js
writes it with textContent alone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import distributions
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from .parts import Curve, Finding, LedgerTable, Table, TokenStrip, plain

SCRIPTS = ("dom.js", "chart.js", "strips.js", "rows.js", "page.js")
FINDING_FIELDS = ("rule", "severity", "message", "count", "share", "examples", "why", "fix")
LEDGER_FIELDS = ("kind", "tokens", "weight", "log_p", "nats_per_token", "share")
MADE_WITH = ("ygivenx", "torch", "transformers")
# Worst first: the order of findings on the page.
SEVERITIES = ("error", "warning", "info")
MARKUP = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@dataclass
class Page:
    """A report under construction: fill its lists, then `write` it. Sections without content are left out.

    verdict: the result in one line; it stands first, in the colour of the worst finding, with what to do about that.
    summary: a few key facts, name to value. findings: see `Finding`; worst first on the page.
    about: what was run, when and with which versions (see `made_by`); it stands last.
    columns: how many of the rows stand side by side, such as the two replies of a pair.
    """

    title: str
    subtitle: str = ""
    verdict: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding | Any] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    ledgers: list[LedgerTable] = field(default_factory=list)
    rows: list[TokenStrip] = field(default_factory=list)
    columns: int = 1
    about: Mapping[str, Any] = field(default_factory=dict)

    def html(self) -> str:
        """The whole file. The same parts give the same bytes."""
        style = _asset("page.css")
        script = "\n".join(map(_asset, SCRIPTS))
        return Template(_asset("page.html")).substitute(
            csp=_policy(style, script),
            title=html.escape(_utf8(self.title)),
            style=style,
            data=_json(self._payload()),
            script=script,
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, making its directory, and return its path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.html(), encoding="utf-8", newline="\n")
        return target

    def _payload(self) -> dict[str, Any]:
        findings = sorted(map(_finding, self.findings), key=_rank)
        return {
            "title": self.title,
            "subtitle": self.subtitle,
            "verdict": self.verdict,
            "summary": _pairs(self.summary),
            "findings": findings,
            "charts": _charts(self.curves),
            "tables": [_table(t) for t in self.tables],
            "ledgers": [_ledger(t) for t in self.ledgers],
            **_strips(self.rows),
            "columns": self.columns,
            "about": _pairs(self.about),
        }


def made_by(**settings: Any) -> dict[str, Any]:
    """For `Page.about`: the date in UTC, the versions that computed what the page shows, and `settings`."""
    found = [f"{d.name} {d.version}" for name in MADE_WITH for d in distributions(name=name)]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(dict.fromkeys([*found, f"Python {platform.python_version()}"])),
        **settings,
    }


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing may load, and of inline code only what we ship may run."""
    return (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """ASCII JSON that can't leave a script element: lone surrogates, U+2028 and controls are escaped too."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(MARKUP)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """JSON's types: NaN becomes null, infinities their sign in words."""
    return plain(value, _in_words)


def _in_words(value: float) -> str | None:
    return None if math.isnan(value) else "∞" if value > 0 else "−∞"


def _reals(values: Iterable[float | None], digits: int | None = None) -> list[float | str | None]:
    """`_plain` of many at once, rounded to `digits`."""
    array = np.asarray(list(values), dtype=np.float64)  # None becomes NaN
    rounded = (array if digits is None else array.round(digits)).tolist()
    return rounded if np.isfinite(array).all() else list(map(_plain, rounded))


def _significant(values: Iterable[float], digits: int) -> np.ndarray:
    """float64: `values` to so many significant digits; a step's weights may be far below 1."""
    array = np.asarray(list(values), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(array))))
        return np.where((array == 0) | ~np.isfinite(array), array, np.round(array * scale) / scale)


def _pairs(named: Mapping[str, Any]) -> list[list[Any]]:
    return [[str(name), _plain(value)] for name, value in named.items()]


def _fields(record: Any, names: Iterable[str]) -> dict[str, Any]:
    if isinstance(record, Mapping):
        return {name: _plain(record.get(name)) for name in names}
    return {name: _plain(getattr(record, name, None)) for name in names}


def _finding(finding: Any) -> dict[str, Any]:
    return _fields(finding, FINDING_FIELDS)


def _rank(finding: dict[str, Any]) -> int:
    severity = finding["severity"]
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def _charts(curves: list[Curve]) -> list[dict[str, Any]]:
    order = list(dict.fromkeys(c.chart for c in curves))
    grouped = groupby(sorted(curves, key=lambda c: order.index(c.chart)), key=lambda c: c.chart)
    charts = []
    for title, members in grouped:
        lines = list(members)
        charts.append(
            {
                "title": title,
                "x_label": lines[0].x_label,
                "curves": [{"name": c.name, "x": _reals(c.x), "y": _reals(c.y)} for c in lines],
            }
        )
    return charts


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": list(map(str, table.columns)),
        "rows": [[_plain(cell) for cell in row] for row in table.rows],
        "notes": list(map(str, table.notes)),
    }


def _ledger(table: LedgerTable) -> dict[str, Any]:
    return {
        "title": table.title,
        "rows": [_fields(row, LEDGER_FIELDS) for row in table.rows],
        "facts": _pairs(table.facts),
        "notes": list(map(str, table.notes)),
    }


def _strips(rows: list[TokenStrip]) -> dict[str, Any]:
    """Token texts and ids once for the whole page, weights and kinds as runs of [value, length]."""
    vocabulary: dict[tuple[str, int | None], int] = {}
    kinds: dict[str, int] = {}
    strips = [_strip(row, vocabulary, kinds) for row in rows]
    return {"vocabulary": list(map(list, vocabulary)), "kinds": list(kinds), "strips": strips}


def _strip(
    row: TokenStrip, vocabulary: dict[tuple[str, int | None], int], kinds: dict[str, int]
) -> dict[str, Any]:
    ids: Iterable[int | None] = map(int, row.ids) if len(row.ids) else [None] * len(row.tokens)
    keys = zip(map(str, row.tokens), ids, strict=True)
    return {
        "title": row.title,
        "tokens": [vocabulary.setdefault(key, len(vocabulary)) for key in keys],
        # Four digits, as weights of a step may be 1e-7: rounding to places would make them 0.
        "weights": _runs(_reals(_significant(row.weights, 4))),
        "log_p": _reals(row.log_p, 4),  # 1e-4 nats: a page with a million tokens has to stay small
        "kinds": _runs(kinds.setdefault(str(k), len(kinds)) for k in row.kinds),
        "notes": list(map(str, row.notes)),
        "fields": _pairs(row.fields),
    }


def _runs(values: Iterable[Any]) -> list[list[Any]]:
    return [[value, sum(1 for _ in run)] for value, run in groupby(values)]
