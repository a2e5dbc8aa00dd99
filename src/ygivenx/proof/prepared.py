"""Prepared data sets: rows of token ids with labels, masks or weights, as trainers write them before a run.

| column                                              | meaning                                                      |
|-----------------------------------------------------|--------------------------------------------------------------|
| input_ids, tokens, token_ids                        | token ids, one row or several documents                      |
| labels                                              | the token itself where it is trained, −100 where it isn't    |
| loss_mask, completion_mask, assistant_masks, …      | 1 where a token is trained                                   |
| weights, loss_weights, loss_scale                   | a weight for each token                                      |
| mask, beside tokens                                 | true where a token is *not* trained (torchtune)              |
| attention_mask                                      | 0 at padding; 1, 2, 3, … where it numbers documents          |
| position_ids, seq_lengths                           | where the documents of a packed row begin                    |

All columns that a row has must agree to train a token. Columns of other names are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, RowError
from ..rows.columnar import arrow_rows
from ..rows.files import open_source
from ..rows.raw import MAX_ROW_BYTES
from ..rows.token_rows import MASKS, WHOLE
from ..sequence import Rejected
from .arrays import documents_of
from .evidence import ObservedRow

IDS = (*WHOLE, "token_ids")
WEIGHTS = ("weights", "loss_weights", "loss_scale")
LABELS = ("labels", *MASKS, *WEIGHTS, "mask")


class Prepared:
    """The rows of a prepared set as ObservedRows, in the file's order; each iteration reads anew.

    path: a directory that `datasets` saved, Parquet, Arrow, JSON Lines or `hf:NAME`. split: one of its splits.
    A row that can't be read comes as Rejected. Raises DataError for a file without a column of token ids.
    """

    def __init__(self, path: str | Path, split: str | None = None, limit: int | None = None) -> None:
        self.name, self.limit = str(path), limit
        self._source = open_source(
            self.name, split, MAX_ROW_BYTES, lambda columns: _ids_column(columns) != ""
        )
        if getattr(self._source, "func", None) is arrow_rows:
            self._source = partial(arrow_rows, *self._source.args, arrays=True)  # type: ignore[attr-defined]
        first = next((r.value for r in self._source() if r is not None and isinstance(r.value, Mapping)), {})
        self.ids_column = _ids_column(first)
        if not self.ids_column:
            raise DataError(
                "no column of token ids",
                where=self.name,
                why=f"its columns are {', '.join(first)}" if first else "it holds no row",
                fix=f"a prepared set has one of {', '.join(IDS)}",
            )
        self.columns = [c for c in LABELS if c in first and (c != "mask" or self.ids_column == "tokens")]

    def __iter__(self) -> Iterator[ObservedRow | Rejected]:
        rows = (raw for raw in self._source() if raw is not None)
        for number, raw in enumerate(rows):
            if number == self.limit:
                return
            try:
                if raw.fault:
                    raise raw.fault
                yield observed(raw.value, self.ids_column, number)
            except RowError as e:
                e.where = f"{self.name}, {raw.place}"
                yield Rejected(raw.value, e.reason, e.where, str(e))


def _ids_column(columns: Any) -> str:
    return next((c for c in IDS if c in columns), "")


def observed(row: Mapping[str, Any], ids_column: str = "input_ids", number: int = 0) -> ObservedRow:
    """One prepared row; raises RowError for a column that doesn't fit the ids."""
    ids = _array(row, ids_column, np.int64)
    length = len(ids)
    shown = row.get("attention_mask")
    marks = np.ones(length, np.int64) if shown is None else _array(row, "attention_mask", np.int64, length)
    attended = marks != 0
    target, weight = _trained(row, ids, ids_column)
    weight[~attended & (target < 0)] = 0
    documents = _documents(row, marks, attended)
    weight[np.flatnonzero(np.diff(documents, prepend=-1))] = 0  # a first token has no context
    target[weight == 0] = -1
    return ObservedRow(0, number, ids, attended, documents, target, weight, place=f"prepared row {number}")


def _trained(row: Mapping[str, Any], ids: np.ndarray, ids_column: str) -> tuple[np.ndarray, np.ndarray]:
    """target int64 [T], weight float64 [T] by all columns that the row has."""
    target, weight = ids.copy(), np.ones(len(ids))
    if row.get("labels") is not None:
        target = _array(row, "labels", np.int64, len(ids))
        weight[target < 0] = 0
    for column in (*MASKS, *WEIGHTS):
        if row.get(column) is not None:
            weight *= _array(row, column, np.float64, len(ids))
    if ids_column == "tokens" and row.get("mask") is not None:  # torchtune's is true where nothing is trained
        weight[_array(row, "mask", np.int64, len(ids)) != 0] = 0
    return target, weight


def _documents(row: Mapping[str, Any], marks: np.ndarray, attended: np.ndarray) -> np.ndarray:
    """int64 [T]: the number of the document that each token is of."""
    lengths = row.get("seq_lengths")
    if lengths is not None and np.ndim(lengths) == 1 and sum(lengths) == len(marks):
        return np.repeat(np.arange(len(lengths)), lengths)
    if marks.max(initial=0) > 1:
        return np.asarray(np.maximum(np.cumsum(np.diff(marks, prepend=0) != 0) - 1, 0))
    if row.get("position_ids") is None:
        return np.zeros(len(marks), np.int64)
    positions = _array(row, "position_ids", np.int64, len(marks))
    return np.asarray(documents_of(positions[None], attended[None])[0])


def _array(row: Mapping[str, Any], column: str, kind: Any, length: int | None = None) -> np.ndarray:
    """A column's values for each token; raises RowError for what is no list of numbers of this length."""
    value = row.get(column)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):  # a batch of one
        value = value[0]
    try:
        array = np.array(value, kind)  # a copy: what isn't trained is struck out
    except (TypeError, ValueError, OverflowError) as e:
        raise RowError("no list of numbers", reason="wrong_type", field=column, why=str(e)) from None
    if array.ndim != 1 or not len(array):
        raise RowError("no list of numbers", reason="wrong_type", field=column)
    if length is not None and len(array) != length:
        raise RowError(f"{len(array)} values for {length} tokens", reason="wrong_length", field=column)
    return array
