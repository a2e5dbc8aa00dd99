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
    """What a rule found: a sentence, how many, what share of what it looked at (0 to 1), located examples."""

    message: str
    count: int | None = None
    share: float | None = None
    examples: tuple[Mapping[str, str], ...] = ()
    severity: Severity | None = None  # where it differs from the rule's


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
