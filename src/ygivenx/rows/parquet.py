"""Examples for other trainers: one Parquet row per sequence.

| column                    | type          | what                                                                 |
|---------------------------|---------------|----------------------------------------------------------------------|
| row, sequence             | int64         | which row that was read, which of its sequences (several if split)   |
| input_ids                 | list<int32>   | token ids                                                            |
| weights                   | list<float32> | weight of each token as a target                                     |
| labels                    | list<int32>   | the id where the weight is > 0, else −100: a view, weights are lost  |
| attention_mask            | list<int8>    | 1 everywhere: nothing is padded                                      |
| position_ids              | list<int32>   | 0, 1, 2, ...                                                         |
| segments                  | list<struct>  | start, stop, kind, output, message                                   |
| notes                     | list<string>  | what a reader has to know                                            |

TRL's SFTTrainer and axolotl take `input_ids` and `labels` as they are; so does a plain torch loop. A mask does
not belong in a template: there it can't be checked, and it changes the text that it marks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..encoded import schema, tables
from ..sequence import Example


def write_parquet(examples: Iterable[Example], path: str | Path) -> int:
    """Write the sequences of examples as they come; returns how many. The file appears whole or not at all."""
    return write_tables(tables(examples), path)


def write_tables(batches: Iterable[Any], path: str | Path) -> int:
    """`write_parquet` from tables of `encoded`."""
    import pyarrow.parquet as pq

    path, count = Path(path), 0
    partial = path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, _schema()) as writer:
        for batch in batches:
            writer.write_batch(_for_trainers(batch))
            count += batch.num_rows
    partial.replace(path)
    return count


def _for_trainers(batch: Any) -> Any:
    """A table of encoded rows with the columns that other trainers look for."""
    import pyarrow as pa

    ids, weights = batch.column("input_ids"), batch.column("weights").values.to_numpy()
    labels = np.where(weights > 0, ids.values.to_numpy(), -100).astype(np.int32)
    length = np.diff(ids.offsets.to_numpy())
    places = np.arange(len(labels)) - np.repeat(np.cumsum(length) - length, length)
    ones, places = np.ones(len(labels), np.int8), places.astype(np.int32)
    derived = {"labels": labels, "attention_mask": ones, "position_ids": places}
    columns = {n: pa.ListArray.from_arrays(ids.offsets, pa.array(values)) for n, values in derived.items()}
    return pa.record_batch(
        [columns[n] if n in columns else batch.column(n) for n in _schema().names], schema=_schema()
    )


def _schema() -> Any:
    import pyarrow as pa

    known = schema()
    derived = {
        "labels": pa.list_(pa.int32()),
        "attention_mask": pa.list_(pa.int8()),
        "position_ids": pa.list_(pa.int32()),
    }
    order = ["row", "sequence", "input_ids", "weights", *derived, "segments", "notes"]
    return pa.schema([pa.field(n, derived[n]) if n in derived else known.field(n) for n in order])
