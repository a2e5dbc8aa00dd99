"""Encoded rows: a file gives back what was encoded, and packs made from it are those made from memory."""

from __future__ import annotations

import numpy as np
import pytest
from templates.conversations import reply, user
from test_chats import THINKER, THOUGHTS, encoder
from tiny import sequences

from ygivenx import encoded
from ygivenx.encoded import EncodedRows
from ygivenx.errors import ConfigError
from ygivenx.sequence import Example
from ygivenx.training.packs import Packs


@pytest.fixture
def examples():
    """Rows 1 and 2 of three: the second one has a sequence per turn."""
    good = [{"messages": [user(), reply(reasoning_content="a", weight=0.5)]}, {"messages": THOUGHTS}]
    return encoder(THINKER).batch([{"messages": []}, *good])[0]


@pytest.fixture(params=["memory", "file"])
def rows(request, examples, tmp_path):
    if request.param == "memory":
        return EncodedRows.of(examples)
    assert encoded.write(encoded.tables(examples), tmp_path / "rows.arrow") == 3
    return EncodedRows.open(tmp_path / "rows.arrow")


def test_what_comes_back_is_what_was_encoded(rows, examples):
    found = list(rows.examples())
    assert [e.index for e in found] == [e.index for e in examples] == [1, 2]
    for a, b in zip(rows, (s for e in examples for s in e), strict=True):
        assert (a.ids == b.ids).all()
        assert (a.weights == b.weights).all()
        assert (a.segments, a.notes) == (b.segments, b.notes)
    assert [rows.name(i) for i in range(3)] == ["row 1", "row 2, turn 0", "row 2, turn 1"]
    assert rows.weight.tolist() == [float(s.weights.sum()) for s in rows]
    assert rows.trained.tolist() == [int((s.weights > 0).sum()) for s in rows]


def test_packs_from_a_file_are_those_from_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "BATCH", 3)  # so that a pack takes from several tables
    rows = sequences(20, seed=1)
    encoded.write(encoded.tables(Example((s,), index=i) for i, s in enumerate(rows)), tmp_path / "a.arrow")
    file = Packs(EncodedRows.open(tmp_path / "a.arrow"), max_tokens=60, seed=3)
    memory = Packs(rows, max_tokens=60, seed=3)
    assert file.fingerprint == memory.fingerprint
    for a, b in zip(file, memory, strict=True):
        assert a["names"] == b["names"]
        for column in ("token", "parent", "end", "weight"):
            assert (getattr(a["forest"], column) == getattr(b["forest"], column)).all()


def test_rows_that_are_seen_more_often_lie_in_packs_of_their_own():
    rows = EncodedRows.of(sequences(6))
    rows.counts[:] = [1, 3, 0, 1, 2, 1]
    packs = Packs(rows, max_tokens=10_000, seed=0)
    assert np.bincount(packs.plan.members, minlength=6).tolist() == rows.counts.tolist()
    assert all(len(set(members)) == len(members) for members in packs.plan)


def test_a_file_of_other_columns_is_refused(tmp_path):
    import pyarrow as pa

    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema({"a": pa.int8()})):
        pass
    with pytest.raises(ValueError, match="other columns"):
        EncodedRows.open(tmp_path / "a.arrow")


def test_an_item_that_is_no_sequence_is_named():
    with pytest.raises(ConfigError, match="item 1 of the data set is a str"):
        EncodedRows.of([*sequences(1), "text"])
