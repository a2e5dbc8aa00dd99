"""`ygx score`: any number of rows in bounded memory, resumable, in input order, nothing lost or doubled."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from rich.console import Console
from tiny import llama
from typer.testing import CliRunner

import ygivenx as yx
from ygivenx.cli import app
from ygivenx.commands.scorerun import Rows, run
from ygivenx.disk import locked
from ygivenx.errors import ConfigError, DataError, ModelError, RowError
from ygivenx.rows.data import read
from ygivenx.scores.scorefile import ScoreFile
from ygivenx.scores.scoring import Tally, request_builder_for, scores


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, smol_tokenizer) -> Path:
    """A random model with the real tokenizer."""
    path = tmp_path_factory.mktemp("model")
    llama(vocab_size=len(smol_tokenizer)).save_pretrained(path)
    smol_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"x": f"Passage {i // 8}. Request {i}?", "y": f" Answer {i}"} for i in range(60)]
    rows[7] = {"x": "several", "y": [" one", " two", " three"]}
    rows[20] = {"x": "control", "y": "<|im_start|>"}
    rows[30] = {"x": 5, "y": "not a text"}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def ygx_score(*args: object) -> Result:
    return CliRunner().invoke(app, ["score", *map(str, args)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_shows_the_model_the_date_of_its_beginning(model_dir, smol_tokenizer, tmp_path):
    """Where the chat template writes one: else rows of one file would have been asked differently."""
    dated = copy.deepcopy(smol_tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + dated.chat_template
    directory = shutil.copytree(model_dir, tmp_path / "dated")
    dated.save_pretrained(directory)
    chats, out = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chats.write_text(json.dumps({"messages": chat}) + "\n")
    args = (chats, "--model", directory, "-o", out, "--tokens")
    first = ygx_score(*args)
    assert "it is taken to be 20" in first.stderr
    note = tmp_path / "out.jsonl.run.json"
    told = json.loads(note.read_text())
    told["run"]["now"] = "2020-01-02T03:04:05"
    note.write_text(json.dumps(told))
    out.write_text("")  # begun then, and interrupted at once
    again = ygx_score(*args)
    assert again.exit_code == 0, again.exception
    assert "".join(lines(out)[0]["token_text"]).startswith("02 Jan 2020")
    out.unlink()  # what is told of a file that is gone says nothing of a new one
    ygx_score(*args)
    assert "2020" not in "".join(lines(out)[0]["token_text"])


def test_rows_in_order_then_nothing_to_do_then_another_run_is_refused(model_dir, pairs, tmp_path):
    out = tmp_path / "out.jsonl"
    done = ygx_score(pairs, "--model", model_dir, "-o", out, "--json", "--unconditional", "Text:")
    assert done.exit_code == 0, done.exception
    account = json.loads(done.stdout)
    assert (account["read"], account["accepted"], account["quarantined"]) == (60, 58, 2)
    assert account["reasons"] == {"control_text": 1, "wrong_type": 1}
    told = lines(out)
    expected = [(i, k) for i in range(60) if i not in (20, 30) for k in range(3 if i == 7 else 1)]
    assert [(r["row"], r["sequence"]) for r in told] == expected
    assert all(r["pmi"] == pytest.approx(r["log_p_y_given_x"] - r["log_p_y"]) for r in told)

    again = ygx_score(pairs, "--model", model_dir, "-o", out, "--json", "--unconditional", "Text:")
    assert again.exit_code == 0, again.exception
    assert json.loads(again.stdout)["run"]["scores"] == 0
    assert "no new pairs" in again.stderr
    assert json.loads(again.stdout)["scored"] == 60
    assert lines(out) == told

    other = ygx_score(pairs, "--model", model_dir, "-o", out, "--border", "split")
    assert isinstance(other.exception, ConfigError)
    assert "belongs to another run" in str(other.exception)
    assert "border (joint → split)" in str(other.exception)
    assert lines(out) == told


def test_parquet_has_the_tokens(model_dir, pairs, tmp_path):
    out = tmp_path / "out.parquet"
    done = ygx_score(pairs, "--model", model_dir, "-o", out, "--tokens", "--limit", 9)
    assert done.exit_code == 0, done.exception
    table = pq.read_table(out).to_pylist()
    assert [r["row"] for r in table] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8]
    for r in table:
        values = [v for v in r["token_log_p"] if v is not None]
        assert sum(values) == pytest.approx(r["log_p_xy"], abs=1e-4)
        assert len(r["token_text"]) == len(r["token_rank"]) == len(r["token_log_p"])
        assert "".join(r["token_text"]).startswith(("Passage", "several"))
    assert not out.with_name("out.parquet.jsonl").exists()
    again = ygx_score(pairs, "--model", model_dir, "-o", out, "--tokens", "--limit", 9)
    assert "complete" in again.stderr


ROWS = 600  # more than are scored before the kill comes


@pytest.mark.full
def test_a_killed_run_goes_on_where_it_ended(model_dir, tmp_path):
    pairs, out, whole = tmp_path / "many.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with pairs.open("w") as file:
        for i in range(ROWS):
            file.write(json.dumps({"x": f"Row {i}: " + "word " * 60 + str(i * i), "y": f" {i}"}) + "\n")
    command = [str(v) for v in (pairs, "--model", model_dir, "--no-marginal", "-o")]
    process = subprocess.Popen(
        [sys.executable, "-m", "ygivenx", "score", *command, str(out)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out.exists() and out.stat().st_size > 2000):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    kept = before.count(b"\n")
    assert 0 < kept < ROWS, "the run has to be killed in its middle"
    with out.open("ab") as file:
        file.write(b'{"row": 9')  # half a line, as a machine that dies may leave it

    done = ygx_score(*command, out, "--json")
    assert done.exit_code == 0, done.exception
    account = json.loads(done.stdout)
    assert account["run"]["scores"] == ROWS - kept  # no finished row is computed again
    assert account["scored"] == account["accepted"] == ROWS
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])

    assert ygx_score(*command, whole).exit_code == 0
    for a, b in zip(lines(out), lines(whole), strict=True):
        assert a["row"] == b["row"]
        assert a["log_p_y_given_x"] == pytest.approx(b["log_p_y_given_x"], abs=1e-4)


@pytest.mark.parametrize("changed", ["model.safetensors", "tokenizer.json", "data", "version"])
def test_another_model_or_other_data_under_the_same_name_is_refused(
    model_dir, tmp_path, monkeypatch, changed
):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(model_dir, model)
    datasets.Dataset.from_list([{"x": "2 + 2 =", "y": " 4"}]).save_to_disk(data)
    out = model / "scores.jsonl"  # what is written beside the weights is no part of the model
    command = (data, "--model", model, "-o", out)
    for _ in range(2):
        done = ygx_score(*command)
        assert done.exit_code == 0, done.exception
    if changed == "version":
        monkeypatch.setattr("ygivenx.commands.scorerun.__version__", "0")
    else:
        file = next(data.glob("*.arrow")) if changed == "data" else model / changed
        os.utime(file, (1, 1))
    kind = {"data": "files of the data", "version": "ygivenx"}.get(changed, "files of the model")
    refused = ygx_score(*command)
    assert isinstance(refused.exception, ConfigError)
    assert f"these differ: {kind} (" in refused.exception.why


def test_another_commit_of_a_model_on_the_hub_is_refused(model_dir, pairs, tmp_path, monkeypatch):
    """The hub's own cache, as it lies after a download, and no network."""
    import huggingface_hub.constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = hub / "models--some--model"
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        shutil.copytree(model_dir, place / "snapshots" / commit)
    (place / "refs").mkdir()
    command, out = (pairs, "--model", "some/model", "--limit", 3, "-o"), tmp_path / "out.jsonl"
    for commit in (commits[0], commits[0], commits[1]):
        (place / "refs" / "main").write_text(commit)
        done = ygx_score(*command, out)
        if commit == commits[0]:
            assert done.exit_code == 0, done.exception
    assert isinstance(done.exception, ConfigError)
    assert f"these differ: revision of the model ({commits[0]} → {commits[1]})" in done.exception.why


def test_two_writers_of_one_file_are_refused(model_dir, pairs, tmp_path):
    out = tmp_path / "out.jsonl"
    with locked(out, "ygx score"):
        done = ygx_score(pairs, "--model", model_dir, "-o", out)
    assert isinstance(done.exception, ConfigError)
    assert f"another process (id {os.getpid()}) is writing there" in str(done.exception)
    assert ygx_score(pairs, "--model", model_dir, "-o", out).exit_code == 0


@pytest.mark.parametrize(
    ("spoil", "again"),
    [
        (
            lambda kept: kept[:5] + kept[6:],
            55,
        ),  # a line in the middle is gone: what follows is computed again
        (lambda kept: kept[:5] + kept[4:], 55),  # one is there twice
        (lambda kept: [*kept[:-1], b"\0" * 300 + b"\n"], 1),  # zeros at the end, as after a loss of power
        (lambda kept: [*kept[:9], b"{}}\n", *kept[9:]], 51),
    ],
)
def test_a_damaged_file_is_mended_from_where_it_is_damaged(model_dir, pairs, tmp_path, spoil, again):
    out = tmp_path / "out.jsonl"
    assert ygx_score(pairs, "--model", model_dir, "-o", out).exit_code == 0
    whole = lines(out)
    out.write_bytes(b"".join(spoil(out.read_bytes().splitlines(keepends=True))))
    done = ygx_score(pairs, "--model", model_dir, "-o", out, "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["run"]["scores"] == again
    for a, b in zip(lines(out), whole, strict=True):
        assert (a["row"], a["sequence"]) == (b["row"], b["sequence"])
        assert a["log_p_y_given_x"] == pytest.approx(b["log_p_y_given_x"], abs=1e-4)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 3}'])
def test_a_torn_note_is_an_error_of_ours(model_dir, pairs, tmp_path, text):
    out = tmp_path / "out.jsonl"
    assert ygx_score(pairs, "--model", model_dir, "-o", out, "--limit", 2).exit_code == 0
    (tmp_path / "out.jsonl.run.json").write_text(text)
    done = ygx_score(pairs, "--model", model_dir, "-o", out, "--limit", 2)
    assert isinstance(done.exception, DataError)
    assert "what is known of the run is damaged" in str(done.exception)


def test_a_full_disk_is_an_error_of_ours(model_dir, pairs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = ygx_score(pairs, "--model", model_dir, "-o", tmp_path / "out.jsonl")
    assert isinstance(done.exception, DataError)
    assert "No space left" in done.exception.why
    assert "make room" in done.exception.fix


def test_ctrl_c_says_what_is_kept(model_dir, pairs, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    monkeypatch.setattr("ygivenx.commands.scorerun.open_model", interrupted)
    done = ygx_score(pairs, "--model", model_dir, "-o", out)
    assert done.exit_code == 130
    assert f"interrupted: 0 scores are in {out}: run it again to go on" in " ".join(done.stderr.split())


def test_an_error_of_a_list_names_the_item(smol_tokenizer):
    model = llama(vocab_size=len(smol_tokenizer))
    with pytest.raises(RowError, match=r"^item 2"):
        yx.score(model, smol_tokenizer, [("a", " b"), ("c", " d"), ("e", "<|im_start|>")])
    with pytest.raises(RowError, match=r"^item 1"):
        yx.score(model, smol_tokenizer, [("a", " b"), 5])


def test_rows_that_are_not_scored_are_written_down(model_dir, pairs, tmp_path):
    bad = tmp_path / "bad.jsonl"
    assert (
        ygx_score(pairs, "--model", model_dir, "-o", tmp_path / "out.jsonl", "--quarantine", bad).exit_code
        == 0
    )
    assert [r["row"] for r in lines(bad)] == [
        {"x": "control", "y": "<|im_start|>"},
        {"x": 5, "y": "not a text"},
    ]


def test_a_finished_parquet_file_without_its_account(tmp_path):
    path = tmp_path / "out.parquet"
    file = ScoreFile(path, {})
    file.write([{"row": 0}])
    file.finish({"scored": 1})
    file.lines.write_text("left by a machine that died before it could tidy up\n")
    again = ScoreFile(path, {})
    assert again.finished
    assert again.account == {"scored": 1}
    assert not again.lines.exists()
    again.note.write_text('{"run": {}}')
    with pytest.raises(DataError, match="no account"):
        _ = ScoreFile(path, {}).account


def test_a_file_that_is_no_run_s_is_never_touched(tmp_path):
    path = tmp_path / "thesis.jsonl"
    path.write_text("precious\n")
    with pytest.raises(ConfigError, match="isn't a run's"):
        ScoreFile(path, {})
    with pytest.raises(ConfigError, match="unknown kind"):
        ScoreFile(tmp_path / "x.csv", {})
    assert path.read_text() == "precious\n"


def test_a_model_that_gives_nan_scores_nothing_and_says_so(smol_tokenizer, pairs, tmp_path):
    model = llama(vocab_size=len(smol_tokenizer))
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    smol_tokenizer.save_pretrained(tmp_path / "model")
    done = ygx_score(pairs, "--model", tmp_path / "model", "-o", tmp_path / "out.jsonl")
    assert isinstance(done.exception, ModelError)
    assert "rows 0 to 59" in str(done.exception)
    assert "gives NaN" in str(done.exception)
    assert "float32" in done.exception.why
    assert lines(tmp_path / "out.jsonl") == []


def test_rows_with_tokens_that_the_model_has_not_are_quarantined(smol_tokenizer, tmp_path):
    model = llama(vocab_size=len(smol_tokenizer))
    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.add_tokens(["<added>"])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"x": "Well?", "y": " yes"}\n{"x": "Well <added> ?", "y": " no"}\n')
    done = ygx_score(data, "--model", tmp_path / "model", "-o", out, "--json")
    assert json.loads(done.stdout)["reasons"] == {"bad_id": 1}
    assert [r["row"] for r in lines(out)] == [0]


def test_a_text_of_probability_zero_is_written_counted_and_read_again(smol_tokenizer, tmp_path):
    model = llama(vocab_size=len(smol_tokenizer))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(smol_tokenizer)))
    model.lm_head.bias.data[smol_tokenizer.encode(" no")[0]] = -torch.inf
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"x": "Well?", "y": " yes"}\n{"x": "Well?", "y": " no"}\n')
    for scored in (2, 0):
        tally = Tally()
        rows = Rows(read(str(data)), request_builder_for(model, smol_tokenizer))
        scorer = partial(scores, model, tally=tally)
        account = run(rows, scorer, tally, ScoreFile(out, {}), Console(quiet=True))
        assert tally.scores == scored
        assert (account["scored"], account["impossible"]) == (2, 1)
        assert account["conditional_nats_per_token"] is None
    possible, impossible = lines(out)
    assert possible["log_p_y_given_x"] < 0
    assert impossible["log_p_y_given_x"] is None
    assert not impossible["greedy"]
