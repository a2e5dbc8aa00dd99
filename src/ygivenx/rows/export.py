"""Encoded rows for trainers, one row per sequence, as Parquet or JSON Lines: the ids as they are.

Ours have the columns of `encoded` up to notes, and what trainers look for: labels (the id where the weight is > 0, else
−100: a view, weights are lost), attention_mask (1 everywhere: nothing is padded) and position_ids. TRL's SFTTrainer,
axolotl and a plain torch loop take them as they are. docs/handover.md has the columns of other forms, with a line of
each: a response begins at the first token with a weight; masks are 1 where tokens have one; log_probs, advantages and
rewards are those of token rows, or null. In the forms of SkyRL and verl, what the model didn't produce has 0 as its
log-probability.

A mask does not belong in a template: there it can't be checked, and it changes the text that it marks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..disk import replaced, writing
from ..encoded import schema
from ..errors import RowError, refuse_unknown
from ..sequence import Example, Logged, RatedExample, Rejected, Sequence

Columns = dict[str, str]  # name in the file → name in `_everything`
FORMS: dict[str, Columns] = {
    "trl": {"input_ids": "input_ids", "labels": "labels"},
    "axolotl": {"input_ids": "input_ids", "attention_mask": "attention_mask", "labels": "labels"},
    "torchtune": {"tokens": "input_ids", "labels": "labels"},
    "skyrl": {
        "prompt_token_ids": "prompt_ids", "response_ids": "response_ids", "loss_masks": "response_mask",
        "rollout_logprobs": "response_log_probs", "rewards": "reward",
    },
    "verl": {
        "prompt_ids": "prompt_ids", "response_ids": "response_ids", "response_mask": "response_mask",
        "response_logprobs": "response_log_probs", "reward_score": "reward",
    },
    "trl-pairs": {"prompt_ids": "prompt_ids", "chosen_ids": "response_ids", "rejected_ids": "other_ids"},
    "trl-kto": {"prompt_ids": "prompt_ids", "completion_ids": "response_ids", "label": "good"},
}  # fmt: skip
RATED = ("trl-pairs", "trl-kto")  # of examples whose replies are rated
_CHUNK = 512  # rows of one row group: memory holds no more


def form_of(name: str) -> Columns:
    """The columns of a form. Raises ConfigError for an unknown one."""
    refuse_unknown("form", [name], FORMS)
    return FORMS[name]


class Written(NamedTuple):
    """How many rows a file has, and how many of them lost weights other than 0 and 1, as the form has no column."""

    rows: int
    reweighted: int


def write_examples(examples: Iterable[Example | RatedExample], path: str | Path, form: str) -> Written:
    """Write the sequences of examples as they come. The file appears whole or not at all.

    `.jsonl` is written as JSON Lines, any other name as Parquet.
    """
    path, columns, reweighted = Path(path), form_of(form), 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal reweighted
        for example in examples:
            for row in _rows(example, form):
                reweighted += "weights" not in columns and not np.isin(row["weights"], (0, 1)).all()
                yield {name: row[source] for name, source in columns.items()}

    write: Callable[..., int] = _write_lines if path.suffix == ".jsonl" else _write_parquet
    with writing(path), replaced(path) as partial:
        count = write(rows(), partial, columns)
    return Written(count, reweighted)


# -- our own columns ---------------------------------------------------------------------------------------


def write_tables(batches: Iterable[Any], path: str | Path) -> int:
    """Write tables of `encoded` as they come, as Parquet; how many sequences. The file appears whole or not at all."""
    import pyarrow.parquet as pq

    path, count = Path(path), 0
    with writing(path), replaced(path) as partial, pq.ParquetWriter(partial, _own_schema()) as writer:
        for batch in batches:
            writer.write_batch(_for_trainers(batch))
            count += batch.num_rows
    return count


def _for_trainers(batch: Any) -> Any:
    """A table of encoded rows with the columns that other trainers look for."""
    import pyarrow as pa

    ids, weights, columns = (
        batch.column("input_ids"),
        batch.column("weights").values.to_numpy(),
        _own_schema(),
    )
    length = np.diff(ids.offsets.to_numpy())
    derived = {
        "labels": np.where(weights > 0, ids.values.to_numpy(), -100),
        "attention_mask": np.ones(len(weights)),
        "position_ids": np.arange(len(weights)) - np.repeat(np.cumsum(length) - length, length),
    }
    lists = {
        n: pa.ListArray.from_arrays(ids.offsets, pa.array(v).cast(columns.field(n).type.value_type))
        for n, v in derived.items()
    }
    return pa.record_batch([lists[n] if n in lists else batch[n] for n in columns.names], schema=columns)


def _own_schema() -> Any:
    import pyarrow as pa

    integers = {"labels": pa.int32(), "attention_mask": pa.int8(), "position_ids": pa.int32()}
    derived = [pa.field(n, pa.list_(kind)) for n, kind in integers.items()]
    first, last = (
        map(schema().field, names)
        for names in (("row", "sequence", "input_ids", "weights"), ("segments", *Logged._fields, "notes"))
    )
    return pa.schema([*first, *derived, *last])


# -- the forms of other trainers ---------------------------------------------------------------------------


# Rows are made twice, here and by the writer: found there, a row that doesn't fit would stop half a file.
def unfit(item: Example | RatedExample | Rejected, form: str) -> Example | RatedExample | Rejected:
    """The item, or as rejected an example that the form can't hold."""
    if isinstance(item, Rejected):
        return item
    try:
        list(_rows(item, form))
    except RowError as error:
        return Rejected(item.row, error.reason, f"row {item.index}", str(error))
    return item


def _rows(example: Any, form: str) -> Iterator[dict[str, Any]]:
    """What there is to write of an example, by `_everything`'s names."""
    if form in RATED:
        yield from (_pairs if form == "trl-pairs" else _judged)(example, form)
        return
    for sequence in example.sequences:
        row = _everything(sequence)
        log_probs = row["response_log_probs"]
        if (
            "response_log_probs" in FORMS[form].values()
            and log_probs is not None
            and np.isnan(log_probs).any()
        ):
            why = f"{form} takes numbers alone, and its ratio of probabilities needs one"
            raise RowError("a trained token without a log-probability", reason="unfit_form", why=why)
        yield row


def _judged(example: RatedExample, form: str) -> Iterator[dict[str, Any]]:
    for reply, reward in zip(example.replies, example.rewards, strict=True):
        yield _everything(_unmasked(reply, form)) | {"good": reward > 0}


def _pairs(example: RatedExample, form: str) -> Iterator[dict[str, Any]]:
    replies = [_everything(_unmasked(reply, form)) for reply in example.replies]
    for better, worse in ((replies[a], replies[b]) for a, b in example.pairs):
        if not np.array_equal(better["prompt_ids"], worse["prompt_ids"]):
            why = "the form has one prompt for both replies"
            raise RowError("the prompts of its replies differ", reason="unfit_form", why=why)
        yield better | {"other_ids": worse["response_ids"]}


def _unmasked(reply: Example, form: str) -> Sequence:
    """A reply's sequence up to its last trained token, with nothing untrained inside: the form has no mask."""
    sequence = reply.sequences[-1]
    stop = int(np.flatnonzero(sequence.weights > 0)[-1]) + 1
    if len(reply.sequences) > 1 or not (sequence.weights[_start(sequence) : stop] > 0).all():
        why = "it has no mask: what stands between the model's own tokens would be trained"
        raise RowError(
            f"a reply with tokens that aren't trained, in the form {form}", reason="unfit_form", why=why
        )
    return Sequence(sequence.ids[:stop], sequence.weights[:stop])


def _start(s: Sequence) -> int:
    return int(np.argmax(s.weights > 0))


def _everything(s: Sequence) -> dict[str, Any]:
    start, trained, log_probs = _start(s), s.weights > 0, s.logged.log_probs
    return {
        "input_ids": s.ids,
        "weights": s.weights,
        "labels": s.labels,
        "attention_mask": np.ones(len(s), np.int8),
        "prompt_ids": s.ids[:start],
        "response_ids": s.ids[start:],
        "response_mask": trained[start:].astype(np.int8),
        "response_log_probs": None if log_probs is None else np.where(trained, log_probs, 0)[start:],
        "reward": s.logged.reward,
        "good": None,
    }


def _write_lines(rows: Iterator[dict[str, Any]], path: Path, columns: Columns) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}
            out.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path, columns: Columns) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, schema = 0, _schema(columns)
    with pq.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(rows, _CHUNK)):
            writer.write_table(
                pa.table({name: [r[name] for r in chunk] for name in schema.names}, schema=schema)
            )
            count += len(chunk)
    return count


def _schema(columns: Columns) -> Any:
    import pyarrow as pa

    types: dict[str, Any] = {
        "reward": pa.float32(), "good": pa.bool_(), "response_log_probs": pa.list_(pa.float32()),
        **dict.fromkeys(("attention_mask", "response_mask"), pa.list_(pa.int8())),
    }  # fmt: skip
    return pa.schema({name: types.get(source, pa.list_(pa.int32())) for name, source in columns.items()})
