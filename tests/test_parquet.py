"""The Parquet file for other trainers, read back by plain torch, datasets and TRL's own preparation."""

from __future__ import annotations

import importlib.util

import pyarrow.parquet as pq
import pytest
import torch
from templates.conversations import reply, user
from test_chats import THINKER, THOUGHTS, encoder

from ygivenx.encoded import tables
from ygivenx.rows.export import write_tables


@pytest.fixture
def written(tmp_path):
    enc = encoder(THINKER)
    good = [{"messages": [user(), reply(reasoning_content="a", weight=0.5)]}, {"messages": THOUGHTS}]
    examples, rejected = enc.batch([{"messages": []}, *good])
    assert len(rejected) == 1
    path = tmp_path / "out.parquet"
    assert write_tables(tables(iter(examples)), path) == 3
    return path, examples


def test_what_is_written_is_what_was_encoded(written):
    path, examples = written
    table = pq.read_table(path).to_pylist()
    sequences = [(n, s) for n, e in enumerate(examples, 1) for s in e]  # row 0 was rejected
    assert [r["row"] for r in table] == [n for n, _ in sequences]
    for r, (_, s) in zip(table, sequences, strict=True):
        assert r["input_ids"] == s.ids.tolist()
        assert r["labels"] == s.labels.tolist()
        assert r["weights"] == s.weights.tolist()
        assert r["position_ids"] == list(range(len(s)))
        assert [(g["start"], g["kind"], g["message"]) for g in r["segments"]] == [
            (g.start, g.kind, g.message) for g in s.segments
        ]
    assert table[0]["weights"][-2] == 0.5


def test_a_failure_leaves_no_file(tmp_path):
    def broken():
        yield encoder(THINKER)({"messages": THOUGHTS})
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="fire"):
        write_tables(tables(broken()), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_plain_torch_reads_it(written):
    rows = pq.read_table(written[0]).to_pylist()
    ids, labels = (torch.nn.utils.rnn.pad_sequence([torch.tensor(r[c]) for r in rows], True, p) for c, p in
                   (("input_ids", 0), ("labels", -100)))  # fmt: skip
    assert ids.shape == labels.shape
    assert ((labels == ids) | (labels == -100)).all()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trls_collator_takes_it(written):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = pq.read_table(written[0], columns=["input_ids", "labels"]).to_pylist()
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    for n, r in enumerate(rows):
        assert batch["labels"][n][: len(r["labels"])].tolist() == r["labels"]


def dataset(path):
    """What axolotl takes as tokenized: a Dataset with these three features."""
    from datasets import Dataset

    columns = ["input_ids", "attention_mask", "labels"]
    return Dataset.from_parquet(str(path), columns=columns, cache_dir=str(path.parent))


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="axolotl is not installed")
@pytest.mark.filterwarnings("ignore")
def test_axolotl_takes_it_as_it_is(written):
    from axolotl.utils.collators import DataCollatorForSeq2Seq
    from axolotl.utils.data.wrappers import get_dataset_wrapper
    from axolotl.utils.dict import DictDefault

    data, tokenizer = dataset(written[0]), encoder(THINKER).tokenizer
    wrapped, _ = get_dataset_wrapper(DictDefault(path="out"), tokenizer, DictDefault(), None, data)
    assert wrapped is data
    batch = DataCollatorForSeq2Seq(tokenizer)(list(wrapped))
    for n, r in enumerate(data):
        assert batch["labels"][n][: len(r["labels"])].tolist() == r["labels"]
        assert (batch["labels"][n][len(r["labels"]) :] == -100).all()


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_three_columns_as_a_dataset(written):
    data = dataset(written[0])
    for r in data:
        assert len(r["input_ids"]) == len(r["labels"]) == len(r["attention_mask"])
        assert set(r["attention_mask"]) == {1}
        assert any(label >= 0 for label in r["labels"])
