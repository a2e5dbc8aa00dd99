"""Scoring and encoding on several machines: Ray Data brings items to workers, and results back in order.

A batch is a Ray task: if its worker dies it is done again elsewhere, and its results are taken once.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np

from ..errors import MissingExtra, RowError
from ..rows.data import Row
from ..sequence import Example, Rejected
from .requests import Request

try:
    import pyarrow as pa
    import ray.data
except ImportError as error:
    raise MissingExtra("ray", "ray", needed_for="a cluster") from error

BATCH = 512  # items that one worker takes together, and that travel together
PORTION = 128 * BATCH  # items whose results come when all of them are there
RayBatch = dict[str, Any]  # number: int64; item, result: pickled
ModelSource = tuple[str, str | None, str]  # directory, GGUF file, dtype


class ScoreWorker:
    """Holds a model on one worker and scores batches of requests; `options` as in `scores`."""

    def __init__(self, model: ModelSource, options: dict[str, Any]) -> None:
        import torch

        from ..models.model import load

        path, gguf_file, dtype = model
        self.model, _ = load(path, gguf_file=gguf_file, dtype=getattr(torch, dtype))
        self.options = options

    def __call__(self, batch: RayBatch) -> RayBatch:
        """Per request its pickled Score, and the batch's counts of tokens beside the first."""
        from .scoring import Tally, scores

        tally = Tally()
        found = list(scores(self.model, map(pickle.loads, batch["item"]), tally=tally, **self.options))
        rest = [0] * (len(found) - 1)
        return _results(batch, found) | {
            "tokens": np.array([tally.tokens, *rest]),
            "distinct": np.array([tally.distinct, *rest]),
        }


class EncodeWorker:
    """Holds an encoder on one worker; `options` are the Encoder's."""

    def __init__(self, path: str, gguf_file: str | None, options: dict[str, Any]) -> None:
        from ..encoder.encode import Encoder

        self.encoder = Encoder.from_pretrained(path, gguf_file=gguf_file, **options)

    def __call__(self, batch: RayBatch) -> RayBatch:
        """Per row its pickled Example, or the Rejected that says why there is none."""
        return _results(batch, [self._encoded(pickle.loads(item)) for item in batch["item"]])

    def _encoded(self, row: Any) -> Example | Rejected:
        if isinstance(row, Rejected):
            return row
        try:
            return self.encoder(row)
        except RowError as error:
            return Rejected(row.raw if isinstance(row, Row) else row, error.reason, error.where, str(error))


def scores_on_ray(
    model: ModelSource, requests: Iterator[Request], *, workers: int, tally: Any, **options: Any
) -> Iterator[Any]:
    """A Score per request, in order, from `workers` workers that each load the model.

    Requests of a portion are sorted by their tokens, so that what shares a prefix comes to one worker; its
    scores come when all are there. `tally` and `options` as in `scores`.
    """
    rows = _on_workers(ScoreWorker, (model, options), requests, workers, key=_tokens)
    for row in rows:
        tally.scores += 1
        tally.tokens += int(row["tokens"])
        tally.distinct += int(row["distinct"])
        yield pickle.loads(row["result"])


def encoded_on_ray(
    path: str, gguf_file: str | None, rows: Iterator[Any], *, workers: int, **options: Any
) -> Iterator[Example | Rejected]:
    """An Example or a Rejected per row (as `Encoder` takes it), in order; options are the Encoder's.

    What was rejected before passes through.
    """
    options = {"now": datetime.now(), **options}  # one time for all workers
    for row in _on_workers(EncodeWorker, (path, gguf_file, options), rows, workers):
        yield pickle.loads(row["result"])


def _on_workers(
    worker: type,
    arguments: tuple[Any, ...],
    items: Iterator[Any],
    workers: int,
    key: Callable[[Any], bytes] = lambda _: b"",
) -> Iterator[dict[str, Any]]:
    """Rows that `workers` workers made of the items, in the items' order, a portion at a time."""
    while blocks := [ray.put(table) for table in _tables(islice(items, PORTION), key)]:
        # One stage at a time: workers that wait for a sort while they hold every core would wait forever.
        data = ray.data.from_arrow_refs(blocks).sort("key").materialize()
        pool = ray.data.ActorPoolStrategy(size=workers)
        done = data.map_batches(worker, fn_constructor_args=arguments, batch_size=BATCH, compute=pool)
        yield from done.materialize().sort("number").iter_rows()


def _tables(items: Iterator[Any], key: Callable[[Any], bytes]) -> Iterator[Any]:
    """Items as tables of `BATCH` rows: their number, what they are sorted by, and themselves, pickled."""
    numbered = enumerate(items)
    while rows := list(islice(numbered, BATCH)):
        yield pa.table(
            {
                "number": pa.array([n for n, _ in rows], pa.int64()),
                "key": pa.array([key(item) for _, item in rows], pa.binary()),
                "item": pa.array([pickle.dumps(item) for _, item in rows], pa.binary()),
            }
        )


def _tokens(request: Request) -> bytes:
    """Bytes that sort like the ids themselves."""
    return request.sequences[0].ids.astype(">u4").tobytes()


def _results(batch: RayBatch, results: list[Any]) -> RayBatch:
    return {"number": batch["number"], "result": np.array([pickle.dumps(m) for m in results], object)}
