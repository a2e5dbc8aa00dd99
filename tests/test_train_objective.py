"""`ygx train --objective`: rated rows of a file to a model, with the same config, page and card as any run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from test_finetune import model_in, train
from typer.testing import CliRunner

import ygivenx as yx
from ygivenx.cli import app
from ygivenx.commands.config import TrainConfig
from ygivenx.errors import ConfigError
from ygivenx.objectives import policy_gradient


@pytest.fixture
def settings(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {i}+{i}?"}],
         "chosen": [{"role": "assistant", "content": f"It is {2 * i}."}],
         "rejected": [{"role": "assistant", "content": f"It is {2 * i + 1}."}]}
        for i in range(6)
    ]  # fmt: skip
    same = {**rows[0], "rejected": rows[0]["chosen"]}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, same]))
    return {
        "data": str(tmp_path / "pairs.jsonl"), "model": model_in(tmp_path / "model"), "max_tokens": 256,
        "output_dir": str(tmp_path / "run"), "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-3,
        "max_steps": 2, "lr_scheduler": "constant",
    }  # fmt: skip


def test_pairs_of_a_file(settings, tmp_path):
    held_out = {"eval_data": settings["data"], "eval_limit": 2}
    result, printed = train(settings, objective={"name": "dpo", "beta": 0.5}, **held_out)
    assert (result["read"], result["reasons"]) == (7, {"same_replies": 1})
    assert "6 rows of 12 rated replies" in printed
    assert result["before"]["eval_margin"] == 0
    assert result["after"]["eval_margin"] > 0
    assert "pairs in order" in printed
    card = (Path(result["model"]) / "README.md").read_text()
    assert "| objective | dpo, beta = 0.5 |" in card
    assert "held-out pairs in order" in card
    html = Path(result["report"]).read_text()
    page = json.loads(re.search(r'type="application/json"[^>]*>(.*?)</script>', html, re.S)[1])
    assert page["columns"] == 2
    assert [s["title"] for s in page["strips"]] == [
        f"row {i}, {c}" for i in range(2) for c in ("chosen", "rejected")
    ]
    longer, printed = train(
        settings, objective={"name": "dpo", "beta": 0.5}, **held_out, max_steps=3, resume="auto"
    )
    assert "step 2 of 3" in printed
    assert longer["losses"][:2] == result["losses"]


def test_token_rows_as_a_sampler_logged_them(settings, tmp_path):
    """Ids, advantages and log-probabilities of a file are those of the loss."""
    rows = [
        {"prompt_token_ids": [5, 6, 7], "token_ids": [8 + i, 9, 10 + i], "logprobs": [-3.5, -4.0 - i, -5],
         "advantages": [0.5 - i, 1, -1]}
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "sampled.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings |= {"data": str(tmp_path / "sampled.jsonl"), "max_steps": 1, "dtype": "float32"}
    result, printed = train(settings, objective={"name": "grpo"})
    assert "3 rows of 3 rated replies" in printed
    model, _ = yx.load(settings["model"])
    ids = [[*r["prompt_token_ids"], *r["token_ids"]] for r in rows]
    policy = yx.log_probs(model, [yx.Sequence(i, [0, 0, 0, 1, 1, 1]) for i in ids])
    advantages, old = (torch.tensor([v for r in rows for v in r[c]]) for c in ("advantages", "logprobs"))
    assert result["losses"][0] == pytest.approx(policy_gradient(policy, advantages, old).item(), rel=1e-5)


def test_the_same_objective_in_flags_and_files(tmp_path):
    required = {"data": "d", "model": "m", "output_dir": "o"}
    file = tmp_path / "run.yaml"
    for text, expected in (
        ("objective: dpo", {"name": "dpo"}),
        ("objective: {name: simpo, gamma: 0.5}", {"name": "simpo", "gamma": 0.5}),
    ):
        file.write_text(text)
        assert TrainConfig.of(file, required).objective.further == expected
    assert TrainConfig.of(file, required | {"objective": {"gamma": 2}}).objective.further["gamma"] == 2


@pytest.mark.parametrize(
    ("flags", "what"),
    [(["--objective", "dop"], "did you mean 'dpo'"), (["--objective", "dpo", "--objective", "bta=1"], "'beta'"),
     (["--objective", "beta=1"], "of which objective"),
     (["--objective", "dpo", "--denominator", "sequence"], "denominator beside an objective")],
)  # fmt: skip
def test_a_wrong_objective_is_refused_before_anything_is_loaded(flags, what):
    required = ["--data", "d", "--model", "m", "--output-dir", "o"]
    result = CliRunner().invoke(app, ["train", *required, *flags])
    assert isinstance(result.exception, ConfigError)
    assert re.search(what, str(result.exception))


@pytest.mark.parametrize("name", ["[]", "false", "{name: [1]}", "3"])
def test_an_objective_of_another_type_is_refused(tmp_path, name):
    (tmp_path / "run.yaml").write_text(f"objective: {name}")
    with pytest.raises(ConfigError, match="is no objective's name"):
        TrainConfig.of(tmp_path / "run.yaml", {"data": "d", "model": "m", "output_dir": "o"})


def test_supervised_runs_quarantine_rated_rows(settings):
    with pytest.raises(ConfigError, match="no row was accepted"):
        train(settings)


def test_both_replies_of_a_row_are_shown(settings):
    done = CliRunner().invoke(app, ["show", settings["data"], "--model", settings["model"], "--row", "1"])
    assert done.exit_code == 0, done.output
    assert "chosen (1): " in done.stdout
    assert "rejected (-1): " in done.stdout
