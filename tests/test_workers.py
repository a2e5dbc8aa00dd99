"""Rows and encoders in workers of a DataLoader, however these start, and in threads."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from templates.conversations import reply, user
from test_chats import encoder
from test_trainer import make
from tiny import llama, sequences
from torch.utils.data import DataLoader, Dataset

from ygivenx import encoded
from ygivenx.encoded import EncodedRows
from ygivenx.sequence import Example
from ygivenx.training.packs import Packs

DATED = (
    "{{ strftime_now('%Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
METHODS = multiprocessing.get_all_start_methods()
ROWS = [{"messages": [user(f"{i} + {i}?"), reply(f"It is {2 * i}.")]} for i in range(12)]


class Encoded(Dataset):
    """Rows that a worker encodes when they are asked for."""

    def __init__(self, encoder) -> None:
        self.encoder = encoder

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> list[int]:
        return self.encoder(ROWS[i]).only.ids.tolist()


def first(batch):
    return batch[0]


def mapped(path, rows) -> EncodedRows:
    encoded.write(encoded.tables(Example((s,), index=i) for i, s in enumerate(rows)), path)
    return EncodedRows.open(path, path.name)


def loaded(data, method=None) -> list:
    workers = {"num_workers": 2, "multiprocessing_context": method} if method else {}
    return list(DataLoader(data, collate_fn=first, **workers))


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_workers_of_any_start_method_see_the_same(method, tmp_path):
    parts = [mapped(tmp_path / f"{n}.arrow", sequences(9, seed=n)) for n in (1, 2)]
    packs = Packs(EncodedRows.joined(parts), max_tokens=60, seed=3)
    for here, there in zip(loaded(packs), loaded(packs, method), strict=True):
        assert here["names"] == there["names"]
        for column in ("token", "parent", "end", "weight"):
            assert (getattr(here["forest"], column) == getattr(there["forest"], column)).all()
    rows = Encoded(encoder(DATED))
    assert loaded(rows) == loaded(rows, method)


@pytest.mark.full
def test_a_run_with_spawned_workers_is_that_without(tmp_path, monkeypatch):
    rows = mapped(tmp_path / "rows.arrow", sequences(9))
    losses = []
    for workers in (0, 2):
        trainer = make(
            tmp_path / str(workers), rows, model=llama(), max_steps=2, dataloader_num_workers=workers
        )
        if workers:
            monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
            multiprocessing.set_start_method("spawn")
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["memory", "file", "files", "spooled"])
def test_rows_come_back_from_a_pickle(kind, tmp_path):
    some = sequences(5)
    made = {
        "memory": lambda: EncodedRows.of(some),
        "file": lambda: mapped(tmp_path / "a.arrow", some),
        "files": lambda: EncodedRows.joined([mapped(tmp_path / f"{n}.arrow", some) for n in "ab"]),
        "spooled": lambda: encoded.spooled(encoded.tables(Example((s,)) for s in some)),
    }
    rows = made[kind]()
    rows.counts[1] = 3
    again = pickle.loads(pickle.dumps(rows))
    assert again.digest.tolist() == rows.digest.tolist()
    assert [again.name(i) for i in range(len(again))] == [rows.name(i) for i in range(len(rows))]
    assert again.counts.tolist() == rows.counts.tolist()


def test_a_pickle_of_mapped_rows_holds_no_rows(tmp_path):
    sizes = [len(pickle.dumps(mapped(tmp_path / f"{n}.arrow", sequences(n)))) for n in (10, 500)]
    assert sizes[1] - sizes[0] < 8 * 490 + 100  # how often each is seen


def test_encoders_of_two_times_in_threads_refuse_nothing():
    encoders = [encoder(DATED, now=datetime(year, 1, 1)) for year in (1999, 2026)]

    def one(n: int) -> list[int]:
        return encoders[n % 2](ROWS[n % len(ROWS)]).only.ids.tolist()

    alone = [one(n) for n in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(200))) == alone
