"""What a row asks of the loss: whether a message, a part of it or the whole row is trained, and how much.

Tools have many names for that. Here each becomes a float `weight` or a list of `spans`:

| key                                   | values            | of            | means             |
|---------------------------------------|-------------------|---------------|-------------------|
| weight, loss_weight, loss_scale       | a number ≥ 0      | OpenAI, ms-swift | factor         |
| train, training                       | true, false       | axolotl       | trained or not    |
| trainable, learnable, loss, loss_mask | true, false, 0, 1 | ms-swift, verl | trained or not   |
| mask, masked                          | true, false       | torchtune     | true: not trained |
| training_detail, train_detail         | a list of objects | axolotl       | spans             |
| spans                                 | a list of objects | ygivenx       | spans             |

axolotl's details have begin_offset, end_offset (the last character) and train; spans have start, stop (one past the
last character) and weight.
Characters of the content that no span names aren't trained, as axolotl has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..errors import RowError
from .values import as_list, as_object

# What these keys become in a message; templates don't see them.
WEIGHT_KEYS = ("weight", "spans")

_FACTORS = ("weight", "loss_weight", "loss_scale")
_FLAGS = ("train", "training")
_SWITCHES = ("trainable", "learnable", "loss", "loss_mask")
_MASKS = ("mask", "masked")
_DETAILS = ("training_detail", "train_detail")
MESSAGE_KEYS = (*_FACTORS, *_FLAGS, *_SWITCHES, *_MASKS)
ROW_KEYS = (*MESSAGE_KEYS, "sample_weight")
# Most messages and rows ask for nothing: one look tells.
_OF_MESSAGES = frozenset({*MESSAGE_KEYS, "spans", *_DETAILS})
_OF_ROWS = frozenset(ROW_KEYS)
_MAX_WEIGHT = 3.4e38  # of float32
_WORDS = {"true": True, "false": False}

Span = dict[str, Any]


def weighted(message: dict[str, Any], at: str) -> dict[str, Any]:
    """A message whose weight and spans are called `weight` and `spans`, whatever the row calls them."""
    if _OF_MESSAGES.isdisjoint(message):
        return message
    weight = take_weight(message, at)
    spans = _take_spans(message, at)
    if spans is not None:
        message["spans"] = spans
        if not any(s["weight"] for s in spans):  # not even its end is asked for
            weight = 0.0
    return message if weight is None else {**message, "weight": weight}


def take_weight(keys: dict[str, Any], at: str) -> float | None:
    """Remove the keys that name a weight; its value, or None without any. Raises RowError if they contradict."""
    weights = {key: _weight(key, keys.pop(key), f"{at}.{key}") for key in MESSAGE_KEYS if key in keys}
    if len(set(weights.values())) > 1:
        what = f"{' and '.join(weights)} contradict each other"
        raise RowError(what, reason="conflict", field=f"{at}.{next(iter(weights))}")
    return next(iter(weights.values()), None)


def row_weight(row: Mapping[str, Any]) -> float:
    """The weight of a whole row by its columns, 1 without any; cells of text, as CSV has them, are read as values.

    A logged `loss`, a number other than 0 and 1, is no weight; anything else that isn't a value of its key is refused.
    """
    if _OF_ROWS.isdisjoint(row):
        return 1.0
    weights = {}
    for key in (k for k in ROW_KEYS if row.get(k) not in (None, "")):
        value = _cell(row[key])
        if isinstance(value, list):
            why = "a mask of tokens belongs to a row of token ids"
            raise RowError(f"a list in the column {key!r}", reason="bad_weight", field=key, why=why)
        if key == "loss" and isinstance(value, int | float) and value not in (0, 1):
            continue
        weights[key] = _weight("weight" if key == "sample_weight" else key, value, key)
    if len(set(weights.values())) > 1:
        what = f"{' and '.join(weights)} contradict each other"
        raise RowError(what, reason="conflict", field=next(iter(weights)))
    return next(iter(weights.values()), 1.0)


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return _WORDS[value.lower()] if value.lower() in _WORDS else float(value)
    except ValueError:
        return value


def _weight(key: str, value: Any, field: str) -> float:
    """One key's value as a factor ≥ 0."""
    is_flag = isinstance(value, bool)
    is_number = not is_flag and isinstance(value, int | float) and 0 <= value <= _MAX_WEIGHT
    if key in _FACTORS:
        fits, needs = is_number, "a number ≥ 0"
    elif key in _SWITCHES:
        fits, needs = is_flag or (is_number and value in (0, 1)), "true, false, 0 or 1"
    else:
        fits, needs = is_flag, "true or false"
    if not fits:
        fix = "a factor between is called weight" if key in _SWITCHES else f"give {needs}"
        raise RowError(f"{value!a:.60} isn't {needs}", reason="bad_weight", field=field, fix=fix)
    return float(not value) if key in _MASKS else float(value)


def _take_spans(message: dict[str, Any], at: str) -> list[Span] | None:
    """The spans of a message's content, in order; None without any."""
    keys = [k for k in ("spans", *_DETAILS) if k in message]
    if not keys:
        return None
    field = f"{at}.{keys[0]}"
    if len(keys) > 1:
        raise RowError(f"{' and '.join(keys)} both name spans", reason="conflict", field=field)
    content, given = message.get("content"), as_list(message.pop(keys[0]), field)
    if not isinstance(content, str):
        raise RowError("spans without a content of text", reason="bad_span", field=field)
    read = _span if keys[0] == "spans" else _detail
    spans = [read(as_object(s, f"{field}[{i}]"), f"{field}[{i}]", len(content)) for i, s in enumerate(given)]
    return _in_order([s for s in spans if s["start"] < s["stop"]], field) if spans else None


def _detail(detail: dict[str, Any], at: str, length: int) -> Span:
    """axolotl's detail. Its end_offset is the last character; one past the content is taken for its end."""
    start, last = (_offset(detail, key, at, length) for key in ("begin_offset", "end_offset"))
    if not isinstance(detail.get("train"), bool):
        raise RowError("train isn't true or false", reason="bad_weight", field=f"{at}.train")
    return {"start": start, "stop": min(last + 1, length), "weight": float(detail["train"])}


def _span(span: dict[str, Any], at: str, length: int) -> Span:
    start, stop = (_offset(span, key, at, length) for key in ("start", "stop"))
    return {"start": start, "stop": stop, "weight": _weight("weight", span.get("weight", 1), f"{at}.weight")}


def _offset(span: Mapping[str, Any], key: str, at: str, length: int) -> int:
    if key not in span:
        what = f"it has no {key}, but {', '.join(map(str, span))}"
        raise RowError(what, reason="bad_span", field=at)
    value = span[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= length:
        what = f"{value!a:.60} is no character of a content of {length}"
        raise RowError(what, reason="bad_span", field=f"{at}.{key}")
    return value


def _in_order(spans: list[Span], field: str) -> list[Span]:
    spans = sorted(spans, key=lambda s: int(s["start"]))
    for a, b in pairwise(spans):
        if b["start"] < a["stop"]:
            what = f"the spans that begin at {a['start']} and {b['start']} overlap"
            raise RowError(what, reason="bad_span", field=field)
    return spans
