"""What is written is whole under its name, or the file that was there is what it was."""

from __future__ import annotations

import errno
import os

import pytest
from tiny import sequences

from ygivenx import disk
from ygivenx.commands.inputs import Account
from ygivenx.encoded import tables
from ygivenx.errors import DataError
from ygivenx.rows.export import write_examples, write_tables
from ygivenx.sequence import Example, Rejected

WRITERS = {
    "parquet": lambda examples, path: write_tables(tables(examples), path),
    "trl.parquet": lambda examples, path: write_examples(examples, path, "trl"),
    "trl.jsonl": lambda examples, path: write_examples(examples, path, "trl"),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("call", ["sync", "replace"])
def test_a_full_disk_leaves_what_was_there(kind, call, tmp_path, monkeypatch):
    path = tmp_path / f"a.{kind.rpartition('.')[2]}"
    path.write_text("before")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*_):
        raise full

    monkeypatch.setattr(disk if call == "sync" else disk.os, call, fails)
    with pytest.raises(DataError, match=r"couldn't be written(.|\n)*No space left(.|\n)*make room"):
        WRITERS[kind]([Example((s,)) for s in sequences(3)], path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_a_file_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    calls, sync, replace = [], disk.sync, os.replace
    monkeypatch.setattr(disk, "sync", lambda p: (calls.append(p.name), sync(p)))
    monkeypatch.setattr(disk.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    disk.replace_text(tmp_path / "a", "text")
    assert calls == ["a.partial", "replace", tmp_path.name]
    assert (tmp_path / "a").read_text() == "text"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_quarantined_rows_on_a_full_disk():
    account = Account("", "/dev/full")
    account.reject(Rejected({"x": 1}, "missing_column", "row 0", "the column y is missing"))
    with pytest.raises(DataError, match="couldn't be written"):
        account.end()
