"""Findings of one part after the other, added up."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from ..report.parts import Finding
from .evidence import Evidence
from .rules import RULES, SEVERITIES, Hit
from .rules.shared import EXAMPLES


class HitCounts:
    """The hits of any number of evidences; hits of one rule that say the same are one finding."""

    def __init__(self) -> None:
        self._hits: dict[tuple[str, str], Hit] = {}

    def add(self, ev: Evidence, *, leave_out: Container[str] = (), only: Container[str] = RULES) -> None:
        """Let the rules look at one more part."""
        for rule in RULES.values():
            if rule.id in only and rule.id not in leave_out:
                for hit in rule.check(ev):
                    key = (rule.id, hit.message)
                    known = self._hits.get(key)
                    self._hits[key] = hit if known is None else _sum(known, hit)

    def findings(self) -> list[Finding]:
        """What was found, most severe first."""
        found = [_finding(name, hit) for (name, _), hit in self._hits.items() if hit.count != 0]
        return sorted(found, key=lambda f: SEVERITIES.index(f.severity))


def _sum(a: Hit, b: Hit) -> Hit:
    count = None if a.count is None or b.count is None else a.count + b.count
    total = None if a.total is None or b.total is None else a.total + b.total
    return replace(a, count=count, total=total, examples=(a.examples + b.examples)[:EXAMPLES])


def _finding(name: str, hit: Hit) -> Finding:
    rule = RULES[name]
    severity = hit.severity_under(rule)
    return Finding(name, severity, hit.message, hit.count, hit.share, hit.examples, rule.why, rule.fix)
