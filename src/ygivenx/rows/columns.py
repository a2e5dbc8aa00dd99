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
_JUDGEMENTS = ("label", "kto_tag")
_MEANINGFUL = frozenset((*REJECTED, *_JUDGEMENTS, *MEDIA_KEYS))


def given(row: Record, column: str) -> Any:
    """The value of a column that may be missing or empty; None if it is."""
    value = row.get(column)
    return None if value in ("", [], {}) else value


def refuse_other_meanings(row: Record, used: tuple[str, ...] = ()) -> None:
    """Raise RowError for a column by which the row isn't what its format takes it for; `used` ones are known."""
    if _MEANINGFUL.isdisjoint(row):
        return
    for column in (c for c in REJECTED if c not in used and given(row, c) is not None):
        raise preference(f"the column {column!r}: the row has a worse reply beside its better one", column)
    for column in (c for c in _JUDGEMENTS if c not in used and _judges(row.get(c))):
        why = "KTO learns from good and bad replies; likelihood alone would learn the bad ones as well"
        fix = f"give only the rows to be learnt, without {column!r}"
        what = f"the column {column!r} says whether the reply is good"
        raise RowError(what, reason="judged_row", field=column, why=why, fix=fix)
    for column in (c for c in MEDIA_KEYS if c not in used and given(row, c) is not None):
        raise not_text(f"the column {column!r} holds what isn't text", column)


def _judges(value: Any) -> bool:
    """Whether a label is a yes or no, in any of its spellings; a class such as "sports" or 7 is none."""
    return str(value).lower() in ("true", "false", "0", "1", "0.0", "1.0")


def preference(what: str, column: str) -> RowError:
    """Two replies to one prompt, where one is trained."""
    why = "supervised training has one reply to a prompt: the other would be dropped"
    fix = "use a preference objective, or give the chosen reply alone (columns prompt and completion, or messages)"
    return RowError(what, reason="preference_row", field=column, why=why, fix=fix)


def is_continued(row: Record) -> bool:
    """Whether a row's last reply is left open, by its column or its template's arguments."""
    value = row.get("continue_final_message")
    if value not in (None, "") and not isinstance(value, bool):
        what = f"{value!a:.60} isn't true or false"
        raise RowError(what, reason="wrong_type", field="continue_final_message")
    return value is True


def json_column(row: Record, column: str, empty: Any) -> Any:
    """A column's value, or that of its JSON; `empty` where it is missing."""
    return encodable(from_json(given(row, column) or empty, column), column)
