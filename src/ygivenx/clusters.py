"""Scoring on several machines: Ray Data brings the questions to workers, and the scores back in order."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from .questions import Question

try:
    import ray.data
except ImportError as error:
    from .errors import MissingExtra

    raise MissingExtra("ray", "ray", needed_for="scoring on a cluster") from error

BATCH = 512  # questions that one worker scores together, and that travel together


class Worker:
    """Holds a model on one worker and scores batches of questions: columns `number` and `question` (pickled)."""

    def __init__(self, model: tuple[str, str | None, str], told: dict[str, Any]) -> None:
        import torch

        from .model import load

        path, gguf_file, dtype = model
        self.model, _ = load(path, gguf_file=gguf_file, dtype=getattr(torch, dtype))
        self.told = told

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch's numbers, and per question its pickled Score, tokens read and distinct tokens."""
        from .scoring import Tally, scores

        tally = Tally()
        questions = [pickle.loads(q) for q in batch["question"]]
        told = [pickle.dumps(s) for s in scores(self.model, iter(questions), tally=tally, **self.told)]
        # The batch's counts stand beside its first question.
        rest = [0] * (len(told) - 1)
        return {
            "number": batch["number"],
            "score": np.array(told, object),
            "tokens": np.array([tally.tokens, *rest]),
            "distinct": np.array([tally.distinct, *rest]),
        }


def scores_on_ray(
    model: tuple[str, str | None, str],
    questions: Iterator[Question],
    *,
    workers: int,
    tally: Any,
    **told: Any,
) -> Iterator[Any]:
    """A Score per question, in order, from `workers` workers that each load `model` (path, GGUF file, dtype).

    Questions are sorted by their tokens, so that what shares a prefix comes to one worker. A batch is a Ray
    task: if its worker dies it is scored again, and a result is taken once. Scores come when all are there.
    `tally` and `told` as in `scores`.
    """
    data = _dataset(questions)
    if data is None:
        return
    told_data = data.sort("key").map_batches(
        Worker, fn_constructor_args=(model, told), batch_size=BATCH, concurrency=workers
    )
    for row in told_data.sort("number").iter_rows():
        tally.scores += 1
        tally.tokens += int(row["tokens"])
        tally.distinct += int(row["distinct"])
        yield pickle.loads(row["score"])


def _dataset(questions: Iterator[Question]) -> Any:
    """The questions in blocks in the cluster's store; None without any."""
    import pyarrow as pa

    blocks, number = [], 0
    while block := list(islice(questions, BATCH)):
        columns = {
            "number": pa.array(range(number, number + len(block)), pa.int64()),
            "key": pa.array([q.sequences[0].ids.astype(">u4").tobytes() for q in block], pa.binary()),
            "question": pa.array([pickle.dumps(q) for q in block], pa.binary()),
        }
        blocks.append(ray.put(pa.table(columns)))
        number += len(block)
    return ray.data.from_arrow_refs(blocks) if blocks else None
