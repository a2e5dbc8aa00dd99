"""Several y's to one x: which one is the most probable, by which normalisation, and how often that is the right one.

| name          | compares                    | lm-evaluation-harness |
|---------------|-----------------------------|-----------------------|
| raw           | log Pr(y given x)           | acc                   |
| per_token     | … / scored tokens of y      |                       |
| per_byte      | … / UTF-8 bytes of y        | acc_bytes             |
| per_character | … / characters of y         | acc_norm              |

Characters are those of y without white space before them: the harness counts a choice without its delimiter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..choices import require_choice
from ..errors import ConfigError, RowError

Normalisation = Literal["raw", "per_token", "per_byte", "per_character"]
_VALUE = {"raw": "log_p_y_given_x"}


def best_choice(scores: Sequence[Any], by: Normalisation = "raw") -> int:
    """The place of the most probable one, the first of equals. scores: Scores, or records of a file of scores.

    Raises ConfigError for an unknown normalisation and for no scores.
    """
    require_choice("by", by, Normalisation)
    if not scores:
        raise ConfigError("there is nothing to choose from", where="scores")
    values = [_value(s, _VALUE.get(by, by)) for s in scores]
    return max(range(len(values)), key=values.__getitem__)


def _value(score: Any, name: str) -> float:
    value = score[name] if isinstance(score, Mapping) else getattr(score, name)
    return -math.inf if value is None or math.isnan(value) else float(value)  # JSON has no −∞


def gold_of(gold: Any, choices: Sequence[str]) -> int:
    """Which choice a row's `gold` names: a place from 0, or the choice's own text. Raises RowError for none."""
    if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices):
        return gold
    if isinstance(gold, str) and choices.count(gold) == 1:
        return choices.index(gold)
    fix = "give a place from 0, or the text of one of them"
    raise RowError(
        f"{gold!a:.60} names none of {len(choices)} choices", reason="bad_gold", field="gold", fix=fix
    )


@dataclass
class Accuracy:
    """Counts rows with a gold choice, by each normalisation, as their records pass: each has a `gold` true or false."""

    rows: int = 0
    correct: Counter[str] = field(default_factory=Counter)
    _row: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one record; those of one row come one after the other."""
        if self._row and self._row[0]["row"] != record["row"]:
            self._close()
        if "gold" in record:
            self._row.append(record)

    def _close(self) -> None:
        if not self._row:
            return
        self.rows += 1
        for by in get_args(Normalisation):
            self.correct[by] += bool(self._row[best_choice(self._row, by)]["gold"])
        self._row = []

    def to_dict(self) -> dict[str, Any]:
        """Shares of right choices, and of how many rows; nothing without such rows."""
        self._close()
        if not self.rows:
            return {}
        shares = {by: self.correct[by] / self.rows for by in get_args(Normalisation)}
        return {"choices": {"rows": self.rows, "accuracy": shares}}
