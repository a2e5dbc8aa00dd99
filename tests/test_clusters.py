"""Scores on a local Ray cluster with two workers: the same values, and a killed worker costs and doubles none."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny import VOCAB, llama

from ygivenx.scores.requests import RequestBuilder, pair_of_ids
from ygivenx.scores.scoring import Tally, scores

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, smol_tokenizer) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    smol_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text_model_dir(tmp_path_factory, smol_tokenizer) -> Path:
    """With all tokens of the tokenizer."""
    path = tmp_path_factory.mktemp("text_model")
    llama(vocab_size=len(smol_tokenizer)).save_pretrained(path)
    smol_tokenizer.save_pretrained(path)
    return path


def requests(count: int) -> list:
    """Shuffled pairs of which eight share a stem."""
    rng = np.random.default_rng(0)
    stems = [rng.integers(0, VOCAB, 60).tolist() for _ in range(count // 8)]
    made = [
        pair_of_ids([*stems[i % len(stems)], *rng.integers(0, VOCAB, 4)], [1, i % VOCAB])
        for i in range(count)
    ]
    return [q for i in rng.permutation(count) for q in RequestBuilder(None)(made[i])]


def test_two_workers_give_the_same_values_and_keep_sharing(cluster, model_dir):
    from ygivenx.scores.clusters import scores_on_ray

    asked, tally = requests(2000), Tally()
    found = list(
        scores_on_ray((str(model_dir), None, "float32"), iter(asked), workers=2, tally=tally, marginal=True)
    )
    expected = list(scores(llama(), asked))
    assert len(found) == len(asked)
    for a, b in zip(found, expected, strict=True):
        assert a.log_p_xy == pytest.approx(b.log_p_xy, abs=1e-4)
    assert tally.scores == 2000
    assert (
        tally.sharing > 4
    )  # neighbours by their tokens come to one worker, in whatever order they were given


def test_a_killed_worker_costs_no_row_and_doubles_none(cluster, model_dir, tmp_path, monkeypatch):
    from ygivenx.scores import clusters

    flag = tmp_path / "killed"

    class Mortal(clusters.ScoreWorker):
        """Dies the first time that a second batch comes to it, half way through."""

        batches = 0

        def __call__(self, batch):
            self.batches += 1
            if self.batches == 2 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    monkeypatch.setattr(clusters, "ScoreWorker", Mortal)
    asked = requests(3000)
    model = str(model_dir), None, "float32"
    found = list(clusters.scores_on_ray(model, iter(asked), workers=2, tally=Tally(), marginal=False))
    assert flag.exists()
    assert len(found) == len(asked)
    for a, b in zip(found, scores(llama(), asked, marginal=False), strict=True):
        assert a.log_p_y_given_x == pytest.approx(b.log_p_y_given_x, abs=1e-4)


def test_rows_are_encoded_in_order_and_none_is_lost(cluster, model_dir, smol_tokenizer):
    from ygivenx.encoder.encode import Encoder
    from ygivenx.scores.clusters import encoded_on_ray
    from ygivenx.sequence import Rejected

    rows = [{"x": f"Row {i}:", "y": f" {i}" if i % 7 else "<|im_start|>"} for i in range(1200)]
    found = list(encoded_on_ray(str(model_dir), None, iter(rows), workers=2, eos=False))
    encoder = Encoder(smol_tokenizer, eos=False)
    assert len(found) == len(rows)
    for i, (row, made) in enumerate(zip(rows, found, strict=True)):
        if i % 7:
            assert made.only.ids.tolist() == encoder(row).only.ids.tolist()
        else:
            assert isinstance(made, Rejected)
            assert made.reason == "control_text"


def test_ygx_encode_and_score_write_the_same_files(cluster, text_model_dir, tmp_path, monkeypatch):
    import pyarrow.parquet as pq
    from typer.testing import CliRunner

    from ygivenx.cli import app
    from ygivenx.scores import clusters

    monkeypatch.setattr(clusters, "PORTION", 24)
    rows = [{"x": f"Row {i}:", "y": f" {i}" if i % 7 else "<|im_start|>"} for i in range(40)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"x": 5}\n')

    def ygx(command: str, output: Path, *more: str) -> dict:
        done = CliRunner().invoke(
            app, [command, str(pairs), "--model", str(text_model_dir), "--json", "-o", str(output), *more]
        )
        assert done.exit_code == 0, done.exception
        return json.loads(done.stdout)

    for command, suffix in (("encode", "parquet"), ("score", "jsonl")):
        alone, spread = tmp_path / f"alone.{suffix}", tmp_path / f"spread.{suffix}"
        accounts = ygx(command, alone), ygx(command, spread, "--ray", "2")
        for key in ("read", "accepted", "quarantined", "reasons"):
            assert accounts[0][key] == accounts[1][key]
        assert accounts[1]["quarantined"] == 7
        if command == "encode":
            assert pq.read_table(alone).equals(pq.read_table(spread))
        else:
            a, b = ([json.loads(line) for line in f.read_text().splitlines()] for f in (alone, spread))
            assert [r["row"] for r in a] == [r["row"] for r in b]
            assert [r["log_p_xy"] for r in a] == pytest.approx([r["log_p_xy"] for r in b], abs=1e-4)

    # An interrupted run goes on: what is there isn't asked for again.
    lines = spread.read_text().splitlines(keepends=True)
    spread.write_text("".join(lines[:30]))
    assert ygx("score", spread, "--ray", "2")["run"]["scores"] == 4
    assert [json.loads(line)["row"] for line in spread.read_text().splitlines()] == [r["row"] for r in a]
