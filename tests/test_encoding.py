"""Rows on their way into encoded rows: on several cores, from several files, and kept for the next run."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from test_finetune import model_in, rows_in

from ygivenx.commands import encoding
from ygivenx.commands.config import DataSection
from ygivenx.encoder.encode import Encoder
from ygivenx.errors import ConfigError, DataError
from ygivenx.proof import auditing
from ygivenx.rows.data import read


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    rows_in(tmp_path / "a.jsonl", count=5, bad=1)
    rows_in(tmp_path / "b.jsonl", count=7)
    return DataSection(cache=str(tmp_path / "cache"), processes=1)


def kept(folder: Path, model: str, data: DataSection, *paths: str, **options):
    """(rows, account, what is said) of files in a folder."""
    said = io.StringIO()
    encoder = Encoder.from_pretrained(model, **options)
    console = Console(file=said, width=300)
    rows, account = encoding.kept_rows([str(folder / p) for p in paths], data, encoder, console)
    return rows, account, said.getvalue()


def test_a_second_run_encodes_nothing(tmp_path, model, data, monkeypatch):
    first, account, said = kept(tmp_path, model, data, "a.jsonl")
    assert (account["accepted"], account["quarantined"], said) == (5, 1, "")
    monkeypatch.setattr(Encoder, "batch", None)
    second, again, said = kept(tmp_path, model, data, "a.jsonl")
    assert "a.jsonl: encoded before" in said
    assert again == account
    assert (second.digest == first.digest).all()


@pytest.mark.parametrize("change", ["bytes", "encoder", "columns", "tokenizer", "limit"])
def test_what_rows_depend_on_makes_them_anew(tmp_path, model, data, change):
    path, options = tmp_path / "a.jsonl", {}
    kept(tmp_path, model, data, "a.jsonl")
    if change == "bytes":  # as many, at the same time
        before = path.stat()
        path.write_text(path.read_text().replace("What is 1+1?", "What is 3+1?"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    elif change == "encoder":
        options = {"train": "last"}
    elif change == "columns":
        data = replace(data, x="answer", y="question")
    elif change == "limit":
        data = replace(data, limit=3)
    else:
        template = Encoder.from_pretrained(model).tokenizer.chat_template
        model = model_in(tmp_path / "other", "{# another #}" + template)
    assert "encoded before" not in kept(tmp_path, model, data, "a.jsonl", **options)[2]


@pytest.mark.full  # processes start in seconds
def test_several_processes_give_the_same_rows(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 2)
    one = kept(tmp_path, model, data, "a.jsonl", "b.jsonl")
    monkeypatch.setattr(encoding, "ALONE", 3)
    several = replace(data, processes=2, cache=str(tmp_path / "other"))
    two = kept(tmp_path, model, several, "a.jsonl", "b.jsonl")
    assert (one[0].digest == two[0].digest).all()
    assert one[1] == two[1]


def dies(chunk):
    os.abort()


@pytest.mark.full
def test_a_process_that_dies_is_an_error_of_ours(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(encoding, "ALONE", 1)
    monkeypatch.setattr(encoding, "_encode_there", dies)
    with pytest.raises(ConfigError, match="has died"):
        kept(tmp_path, model, replace(data, processes=2), "b.jsonl")


def test_several_files_are_one_set_and_rows_say_which(tmp_path, model, data):
    rows, account, _ = kept(tmp_path, model, data, "?.jsonl")
    assert (account["read"], len(rows)) == (13, 12)
    assert [rows.name(i) for i in (0, 5)] == ["row 1 of a.jsonl", "row 0 of b.jsonl"]
    with pytest.raises(DataError, match="no file matches"):
        kept(tmp_path, model, data, "*.parquet")


def test_a_limit_counts_over_all_files(tmp_path, model, data):
    assert kept(tmp_path, model, replace(data, limit=8), "a.jsonl", "b.jsonl")[1]["read"] == 8


def test_a_mixture_sees_rows_as_often_as_it_says(tmp_path, model, data):
    rows, _, _ = kept(tmp_path, model, replace(data, mix={"a": 2.4, "b.jsonl": 0}), "a.jsonl", "b.jsonl")
    assert sorted(rows.counts[:5]) == [2, 2, 2, 3, 3]
    assert not rows.counts[5:].any()
    for mix, message in (
        ({"c": 1}, "no file is called 'c'"),
        ({"a": -1}, "a=-1"),
        ({"a": "x"}, "give a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            kept(tmp_path, model, replace(data, mix=mix), "a.jsonl", "b.jsonl")


def test_quarantined_rows_are_written_down_by_a_second_run_too(tmp_path, model, data):
    for name in ("first", "second"):
        kept(tmp_path, model, replace(data, quarantine=str(tmp_path / name)), "a.jsonl", "b.jsonl")
    (row,) = map(json.loads, (tmp_path / "second").read_text().splitlines())
    assert row["reason"] == "wrong_type"
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text()


def test_an_account_comes_back_as_it_was(tmp_path, model, data):
    first = kept(tmp_path, model, data, "a.jsonl", max_length=24, overflow="truncate")[1]
    assert first["cut"]["rows"] == sum(first["notes"].values()) == 5
    assert kept(tmp_path, model, data, "a.jsonl", max_length=24, overflow="truncate")[1] == first


def test_an_interrupted_run_leaves_nothing(tmp_path, model, data, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "encode_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, model, data, "a.jsonl")
    assert list((tmp_path / "cache").iterdir()) == []


def test_parquet_and_arrow_are_read_as_lines_are(tmp_path, model, data):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([json.loads(x) for x in (tmp_path / "b.jsonl").read_text().splitlines()])
    pq.write_table(table, tmp_path / "b.parquet")
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    digests = [kept(tmp_path, model, data, f"b.{kind}")[0].digest for kind in ("jsonl", "parquet", "arrow")]
    assert np.array_equal(digests[0], digests[1])
    assert np.array_equal(digests[0], digests[2])


def test_an_audit_reads_a_file_in_chunks_and_holds_no_rows(tmp_path, model, monkeypatch):
    rows_in(tmp_path / "a.jsonl", count=5, bad=2)
    reader, encoder = read(tmp_path / "a.jsonl"), Encoder.from_pretrained(model)
    whole = auditing.audit(reader, encoder)
    monkeypatch.setattr(auditing, "CHUNK", 2)
    in_chunks = auditing.audit(reader, encoder)
    assert in_chunks.to_dict() == whole.to_dict()
    assert whole.summary["rows"] == 7
    assert [r.row for r in in_chunks.evidence.rejected] == [None, None]


def test_a_data_set_of_the_hub_goes_by_its_commit(monkeypatch):
    """Without a network it has no name that another run could have."""
    from huggingface_hub import HfApi

    commits = {"someone/rows": "0a1b"}
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name: SimpleNamespace(sha=commits[name]))
    known = encoding._content("hf:someone/rows")
    assert known == encoding._content("hf:someone/rows:config") == "0a1b"
    commits["someone/rows"] = "2c3d"
    assert encoding._content("hf:someone/rows") == "2c3d"
    assert encoding._content("hf:nobody/rows") != encoding._content("hf:nobody/rows")
