"""What a rule is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from ...choices import Severity
from ..evidence import Evidence

SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Hit:
    """What a rule found: a sentence, how many, of how many that it looked at, located examples.

    A count of 0 is no finding: it says how many were looked at, for audits that are put together of parts.
    """

    message: str
    count: int | None = None
    total: int | None = None
    examples: tuple[Mapping[str, str], ...] = ()
    severity: Severity | None = None  # where it differs from the rule's
    severity_of_all: Severity | None = None  # where it holds of all that was looked at

    @property
    def share(self) -> float | None:
        """count / total, from 0 to 1; None without a total."""
        return None if self.count is None or self.total is None else self.count / max(self.total, 1)

    def severity_under(self, rule: Rule) -> Severity:
        """How severe it is: by the hit itself, else by its rule."""
        of_all = self.severity_of_all if self.count == self.total else None
        return of_all or self.severity or rule.severity


RuleCheck = Callable[[Evidence], Iterable[Hit]]


@dataclass(frozen=True)
class Rule:
    id: str
    severity: Severity
    why: str
    fix: str
    check: RuleCheck


RULES: dict[str, Rule] = {}


def rule(name: str, severity: Severity, *, why: str, fix: str) -> Callable[[RuleCheck], RuleCheck]:
    """A decorator that enters a check into RULES."""

    def enter(check: RuleCheck) -> RuleCheck:
        RULES[name] = Rule(name, severity, why, fix, check)
        return check

    return enter
