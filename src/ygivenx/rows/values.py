"""Values of a row, checked: objects, lists, texts that can be encoded, JSON. Each raises RowError with its field."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import RowError
from .strictjson import Strict

# A template follows nested values on Python's stack, and so does the JSON encoder.
MAX_DEPTH = 64

_NAMES = {dict: "an object", list: "a list", str: "text", type(None): "null"}


def as_object(value: Any, at: str) -> dict[str, Any]:
    """A copy of an object."""
    if not isinstance(value, Mapping):
        raise _wrong_type(value, "an object", at)
    return dict(value)


def as_list(value: Any, at: str) -> list[Any]:
    """A copy of a list."""
    if not isinstance(value, list | tuple):
        raise _wrong_type(value, "a list", at)
    return list(value)


def finite(value: Any, at: str) -> float:
    """A finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong_type(value, "a number", at)
    if not math.isfinite(value):
        raise RowError(f"{value} is no finite number", reason="not_a_number", field=at)
    return float(value)


def agreed(
    row: Mapping[str, Any],
    names: Iterable[str],
    at: str = "",
    read: Callable[[str], Any] | None = None,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> Any:
    """The one value of a field under its names; None where all are missing or empty.

    read: the value of a name, by default the row's. Raises RowError `conflict` where two names hold different values.
    """
    found = {n: (read or row.get)(n) for n in names if n in row and row[n] not in (None, "", [], {})}
    first = next(iter(found), "")
    for name, value in found.items():
        if not same(value, found[first]):
            why, fix = "they name one field, and one of them would be ignored", "leave the right one of them"
            what = f"{first} and {name} contradict each other"
            raise RowError(what, reason="conflict", field=f"{at}.{name}" if at else name, why=why, fix=fix)
    return found.get(first)


def text(value: Any, at: str) -> str:
    """A text that can be encoded."""
    if not isinstance(value, str):
        raise _wrong_type(value, "text", at)
    try:
        # isascii() looks at a flag of the object; only other texts, a few, are encoded to see whether they can be.
        value.isascii() or value.encode()
    except UnicodeEncodeError as e:
        raise RowError("half a surrogate pair", reason="lone_surrogate", field=at, why=e.reason) from None
    return value


def encodable(value: Any, at: str, depth: int = MAX_DEPTH) -> Any:
    """A value as it is, if its texts can be encoded (half a surrogate pair is no character) and it isn't nested deeper.

    A template may write any of it, and Python's stack bounds what can be followed through one.
    """
    if isinstance(value, str):
        return text(value, at)
    if not isinstance(value, Mapping | list | tuple):
        return value
    if not depth:
        why = f"more than {MAX_DEPTH} levels"
        raise RowError("nested too deeply", reason="too_deep", field=at.split(".", 1)[0], why=why)
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        encodable(key, at)
        encodable(item, f"{at}.{key}" if isinstance(value, Mapping) else f"{at}[{key}]", depth - 1)
    return value


def json_value(value: Any, at: str) -> Any:
    """An encodable value as it is, if JSON has such values: templates write it as JSON."""
    encodable(value, at)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise RowError("not a JSON value", reason="wrong_type", field=at, why=str(e)) from None
    return value


def from_json(value: Any, at: str) -> Any:
    """The value of a text that holds JSON, as CSV cells and many `tools` columns do; others as they are."""
    if not isinstance(value, str):
        return value
    try:
        return Strict().whole(value)
    except RowError as e:
        what = f"the text {value!a:.60} is {e.what}" if e.reason == "broken_json" else e.what
        raise RowError(what, reason=e.reason, field=at, why=e.why, fix=e.fix) from None


def _wrong_type(value: Any, needed: str, at: str) -> RowError:
    kind = _NAMES.get(type(value), type(value).__name__)
    return RowError(f"{kind} where {needed} belongs", reason="wrong_type", field=at)
