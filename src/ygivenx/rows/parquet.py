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

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..sequence import Example, Sequence

_CHUNK = 512  # sequences per row group: memory holds no more


def write_parquet(examples: Iterable[Example], path: str | Path) -> int:
    """Write the sequences of examples as they come; returns how many. The file appears whole or not at all."""
    import pyarrow.parquet as pq

    path, count = Path(path), 0
    partial = path.with_name(path.name + ".partial")
    schema = _schema()
    with pq.ParquetWriter(partial, schema) as writer:
        for rows in _chunks(_rows(examples)):
            writer.write_table(_table(rows, schema))
            count += len(rows)
    partial.replace(path)
    return count


def _rows(examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
    for place, example in enumerate(examples):
        number = place if example.index is None else example.index
        for n, sequence in enumerate(example.sequences):
            yield {"row": number, "sequence": n, **_columns(sequence)}


def _columns(s: Sequence) -> dict[str, Any]:
    return {
        "input_ids": s.ids,
        "weights": s.weights,
        "labels": s.labels,
        "attention_mask": [1] * len(s),
        "position_ids": range(len(s)),
        "segments": [
            {"start": g.start, "stop": g.stop, "kind": g.kind, "output": g.output, "message": g.message}
            for g in s.segments
        ],
        "notes": list(s.notes),
    }


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _table(rows: list[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.table({name: [r[name] for r in rows] for name in schema.names}, schema=schema)


def _schema() -> Any:
    import pyarrow as pa

    segment = pa.struct(
        {
            "start": pa.int32(),
            "stop": pa.int32(),
            "kind": pa.string(),
            "output": pa.bool_(),
            "message": pa.int32(),
        }
    )
    return pa.schema(
        {
            "row": pa.int64(),
            "sequence": pa.int64(),
            "input_ids": pa.list_(pa.int32()),
            "weights": pa.list_(pa.float32()),
            "labels": pa.list_(pa.int32()),
            "attention_mask": pa.list_(pa.int8()),
            "position_ids": pa.list_(pa.int32()),
            "segments": pa.list_(segment),
            "notes": pa.list_(pa.string()),
        }
    )
