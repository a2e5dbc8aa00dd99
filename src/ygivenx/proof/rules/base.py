"""What a rule is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..evidence import Evidence

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Hit:
    """What a rule found: a sentence, how many, what share of what it looked at (0 to 1), located examples."""

    message: str
    count: int | None = None
    share: float | None = None
    examples: tuple[Mapping[str, str], ...] = ()
    severity: str | None = None  # where it differs from the rule's


@dataclass(frozen=True)
class Rule:
    id: str
    severity: str
    why: str
    fix: str
    check: Callable[[Evidence], Iterable[Hit]]


RULES: dict[str, Rule] = {}


def rule(name: str, severity: str, *, why: str, fix: str) -> Callable[[Callable], Callable]:
    def enter(check: Callable[[Evidence], Iterable[Hit]]) -> Callable[[Evidence], Iterable[Hit]]:
        RULES[name] = Rule(name, severity, why, fix, check)
        return check

    return enter
