"""Columns that change what a row means. A format uses them, or the row is refused by what it is; none is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RowError
from .messages import MEDIA_KEYS, not_text
from .values import encodable, from_json

Record = Mapping[str, Any]

REJECTED = (
    "rejected",
    "rejected_response",
    "rejected_messages",
    "rejected_responses",
    "non_preferred_output",
)
JUDGEMENTS = ("label", "kto_tag")
CHANGE_MEANING = frozenset((*REJECTED, *JUDGEMENTS, *MEDIA_KEYS))


def given(row: Record, column: str) -> Any:
    """The value of a column that may be missing or empty; None if it is."""
    value = row.get(column)
    return None if value in ("", [], {}) else value


def refuse_other_meanings(row: Record, used: tuple[str, ...] = ()) -> None:
    """Raise RowError for a column by which the row isn't what its format takes it for; `used` ones are known."""
    if CHANGE_MEANING.isdisjoint(row):
        return
    for column in (c for c in REJECTED if c not in used and given(row, c) is not None):
        raise rated_row(
            "preference_row",
            f"the column {column!r}: the row has a worse reply beside its better one",
            column,
        )
    for column in (c for c in JUDGEMENTS if c not in used and _says(row.get(c)) is not None):
        raise rated_row("judged_row", f"the column {column!r} says whether the reply is good", column)
    for column in (c for c in MEDIA_KEYS if c not in used and given(row, c) is not None):
        raise not_text(f"the column {column!r} holds what isn't text", column)


# Cells of CSV are texts, and pandas writes a column of 0 and 1 that has gaps as 0.0 and 1.0.
_SPELLED = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _says(value: Any) -> bool | None:
    """The yes or no of a label, in any of its spellings; None for a class such as "sports" or 7."""
    return _SPELLED.get(str(value).lower())


def judgement(row: Record, used: tuple[str, ...] = ()) -> bool | None:
    """What KTO's columns say of the row's reply, `used` ones apart; None where they say nothing."""
    by_column = {c: _says(row[c]) for c in JUDGEMENTS if c in row and c not in used}
    found = {value for value in by_column.values() if value is not None}
    if len(found) > 1:
        what = f"{' and '.join(by_column)} contradict each other"
        raise RowError(what, reason="conflict", field=next(iter(by_column)))
    return next(iter(found), None)


_LIKELIHOOD = {
    "judged_row": (
        "KTO learns from good and bad replies; likelihood alone would learn the bad ones as well",
        "use an objective for rated replies (ygx train --objective kto), or give only the rows to be learnt, without "
        "the column",
    ),
    "preference_row": (
        "supervised training has one reply to a prompt: the other would be dropped",
        "use a preference objective (ygx train --objective dpo), or give the chosen reply alone (columns prompt and "
        "completion, or messages)",
    ),
}


def rated_row(reason: str, what: str, column: str = "") -> RowError:
    """A reply that is said to be good or bad (`judged_row`), or two to one prompt, where one is trained."""
    why, fix = _LIKELIHOOD[reason]
    return RowError(what, reason=reason, field=column, why=why, fix=fix)


def is_continued(row: Record) -> bool | None:
    """Whether a row's last reply is left open, by its column; None where that says nothing."""
    value = row.get("continue_final_message")
    if value not in (None, "") and not isinstance(value, bool):
        what = f"{value!a:.60} isn't true or false"
        raise RowError(what, reason="wrong_type", field="continue_final_message")
    return value if isinstance(value, bool) else None


def json_column(row: Record, column: str, empty: Any) -> Any:
    """A column's value, or that of its JSON; `empty` where it is missing."""
    return encodable(from_json(given(row, column) or empty, column), column)
