"""Rows to ids and labels on all machines of a Ray cluster: one actor holds the encoder, batches come and go.

    pip install "ygivenx[ray]"
    python examples/ray_data.py chats.jsonl sample encoded

A row that can't be used keeps its place, with the reason: accepted + quarantined = read. `ygx encode --ray N` does the
same with one command and one file.
"""

import json
import sys
from typing import Any

import pyarrow as pa
import ray

import ygivenx as yx


class Encode:
    """Made once on each worker: the tokenizer is loaded there."""

    def __init__(self, model: str) -> None:
        self.encode = yx.Encoder.from_pretrained(model)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "reason": []}
        for text in batch["text"]:
            try:
                sequences = self.encode(json.loads(text)).sequences
            except yx.errors.RowError as error:
                values: list[tuple[Any, Any, Any]] = [(None, None, error.reason)]
            else:
                values = [(s.ids, s.labels, None) for s in sequences]  # several where a template needs that
            for name, column in zip(columns, zip(*values, strict=True), strict=True):
                columns[name] += column
        lists = pa.list_(pa.int32())
        return pa.table(
            columns, schema=pa.schema({"input_ids": lists, "labels": lists, "reason": pa.string()})
        )


def main(path: str, model: str, output: str) -> dict[str, int]:
    rows = ray.data.read_text(path, drop_empty_lines=True)
    encoded = rows.map_batches(
        Encode, fn_constructor_args=(model,), compute=ray.data.ActorPoolStrategy(size=1), batch_size=512
    ).materialize()
    quarantined = encoded.filter(lambda row: row["reason"] is not None).count()
    accepted = encoded.filter(lambda row: row["reason"] is None)
    accepted.select_columns(["input_ids", "labels"]).write_parquet(output)
    return {"sequences": accepted.count(), "quarantined": quarantined}


if __name__ == "__main__":
    print(main(*sys.argv[1:4]))
