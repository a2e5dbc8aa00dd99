"""`ygx train` takes known keys of the right type, from YAML and flags; flags win."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from ygivenx.commands.config import _SCHEDULES, TrainConfig
from ygivenx.errors import ConfigError

NEEDED = {"data": "d.jsonl", "model": "sample", "output_dir": "out"}


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: d.jsonl\nmodel: m\noutput_dir: o\nlearning_rate: 2e-5\nseed: 3\n")
    config = TrainConfig.of(path, {"seed": 4, "limit": None})
    assert (config.learning_rate, config.seed, config.model) == (2e-5, 4, "m")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"seed": "three"}, "seed must be int, got 'three'"),
        ({"seed": True}, "seed must be int"),
        ({"plain": "yes"}, "plain must be bool"),
        ({"learning_rate": "fast"}, "learning_rate must be float"),
        ({"data": None}, "missing: data"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'(.|\n)*cosine"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296(.|\n)*from 0 to 4294967295"),
        ({"lora": 0}, "lora is 0(.|\n)*a number ≥ 1"),
        ({"logging_steps": 0}, "logging_steps is 0"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"epochs": 0}, "epochs is 0.0(.|\n)*> 0"),
        ({"epochs": "nan"}, "epochs is nan"),
        ({"learning_rate": "inf"}, "learning_rate is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"denominator": "rows"}, "denominator is 'rows'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"eval_steps": 3}, "eval_steps without eval_data"),
        ({"eval_limit": 3}, "eval_limit without eval_data"),
        ({"eval_split": "test"}, "eval_split without eval_data"),
    ],
)
def test_what_is_refused(told, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.of(None, NEEDED | told if told != {"data": None} else {"model": "m", "output_dir": "o"})


@pytest.mark.parametrize("name", _SCHEDULES)
def test_every_schedule_runs_without_settings_of_its_own(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)


def test_it_is_said_where_a_mistake_stands(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: d\nmodel: m\noutput_dir: o\nlr_scheduler: cosin\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: lr_scheduler is 'cosin'"):
        TrainConfig.of(path, {})
    with pytest.raises(ConfigError, match=r"^flags: lr_scheduler is 'linea'"):
        TrainConfig.of(path, {"lr_scheduler": "linea"})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "1: 2\n", "", "seed: 1\nlimit: 2\nseed: 3\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        TrainConfig.of(path, NEEDED)


def test_options_of_the_encoder_are_checked_too():
    config = TrainConfig.of(None, NEEDED | {"encoder": {"repair": "all"}})
    assert config.encoder == {"repair": "all"}
    with pytest.raises(ConfigError, match="did you mean 'repair'"):
        TrainConfig.of(None, NEEDED | {"encoder": {"repairs": "all"}})
    with pytest.raises(ConfigError, match="encoder must be"):
        TrainConfig.of(None, NEEDED | {"encoder": "repair"})
