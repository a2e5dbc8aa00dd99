"""`ygx train` takes known keys of the right type, from YAML and flags; flags win."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from transformers import get_scheduler

from ygivenx.commands import config as options
from ygivenx.commands.config import TrainConfig, TrainingSection
from ygivenx.commands.finetune import arguments_of
from ygivenx.errors import ConfigError

SCHEDULES = get_args(get_type_hints(TrainingSection)["lr_scheduler_type"])
NEEDED = {"data": "d.jsonl", "model": "sample", "output_dir": "out"}


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: d.jsonl\nmodel: m\noutput_dir: o\nlearning_rate: 2e-5\nseed: 3\n")
    config = TrainConfig.of(path, {"seed": 4, "limit": None})
    assert (config.training.learning_rate, config.training.seed, config.model.path) == (2e-5, 4, "m")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"seed": "three"}, "seed must be int, got 'three'"),
        ({"seed": True}, "seed must be int"),
        ({"plain": "yes"}, "plain must be bool"),
        ({"learning_rate": "fast"}, "learning_rate must be float"),
        ({"data": None}, "missing: --data"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler must be one of (.|\n)*did you mean 'cosine'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296(.|\n)*from 0 to 4294967295"),
        ({"lora": 0}, "lora.r is 0(.|\n)*a rank ≥ 1"),
        ({"logging_steps": 0}, "logging_steps is 0"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"epochs": 0}, "epochs is 0.0(.|\n)*> 0"),
        ({"epochs": "nan"}, "epochs is nan"),
        ({"learning_rate": "inf"}, "learning_rate is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"denominator": "rows"}, "denominator must be one of tokens, sequence, got 'rows'"),
        ({"dtype": "int8"}, "dtype must be one of auto"),
        ({"eval_steps": 3}, "eval_steps without eval_data"),
        ({"eval_limit": 3}, "eval_limit without eval_data"),
        ({"eval_split": "test"}, "eval_split without eval_data"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end without eval_data"),
        ({"data": {"xx": "q"}}, "unknown key 'xx'(.|\n)*did you mean 'x'"),
        (
            {"data": {"pth": "q"}},
            r"data: unknown key 'pth'; did you mean 'path'(.|\n)*known: format.*eval_path",
        ),
        ({"modell": {"path": "q"}}, r"unknown section 'modell'(.|\n)*known: data, encoder, .*, output$"),
        ({"lora": {"r": "sixteen"}}, r"lora\.r must be int, got 'sixteen'"),
        ({"training": {"adam_beta3": 0.9}}, "unknown field of TrainingArguments 'adam_beta3'; did you mean"),
        ({"training": {"adam_beta2": "high"}}, "adam_beta2 must be float, got 'high'"),
        ({"training": {"per_device_train_batch_size": 4}}, "use --max-tokens"),
        ({"training": {"bf16": True}}, "use --dtype bf16"),
        (
            {"lora": {"r": 4, "lora_alfa": 8}},
            "unknown field of LoraConfig 'lora_alfa'; did you mean 'lora_alpha'",
        ),
    ],
)
def test_what_is_refused(told, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.of(None, NEEDED | told if told != {"data": None} else {"model": "m", "output_dir": "o"})


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_without_settings_of_its_own(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)


def test_it_is_said_where_a_mistake_stands(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: d\nmodel: m\noutput_dir: o\nlr_scheduler: cosin\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: lr_scheduler must be .* got 'cosin'"):
        TrainConfig.of(path, {})
    with pytest.raises(ConfigError, match=r"^flags: lr_scheduler must be .* got 'linea'"):
        TrainConfig.of(path, {"lr_scheduler": "linea"})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "1: 2\n", "", "seed: 1\nlimit: 2\nseed: 3\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        TrainConfig.of(path, NEEDED)


def test_options_of_the_encoder_are_checked_too():
    config = TrainConfig.of(None, NEEDED | {"encoder": {"repair": "all"}})
    assert config.encoder.further == {"repair": "all"}
    with pytest.raises(ConfigError, match="did you mean 'repair'"):
        TrainConfig.of(None, NEEDED | {"encoder": {"repairs": "all"}})
    with pytest.raises(ConfigError, match="encoder must be dict"):
        TrainConfig.of(None, NEEDED | {"encoder": "repair"})


def test_sections_and_flat_keys_are_the_same_run(tmp_path):
    flat = NEEDED | {"lora": 4, "epochs": 2, "train": "last", "x": "question"}
    nested = {
        "data": {"path": "d.jsonl", "x": "question"}, "model": {"path": "sample"}, "output": {"dir": "out"},
        "lora": {"r": 4}, "training": {"num_train_epochs": 2}, "encoder": {"train": "last"},
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(nested))
    assert TrainConfig.of(path, {}) == TrainConfig.of(None, flat)


def test_any_field_of_the_libraries_may_be_given():
    further = {"adam_beta2": "0.95", "neftune_noise_alpha": 5}
    config = TrainConfig.of(None, NEEDED | {"training": further, "lora": {"r": 4, "use_dora": True}})
    assert config.training.further == {"adam_beta2": 0.95, "neftune_noise_alpha": 5.0}
    assert config.lora.further == {"r": 4, "use_dora": True}
    with pytest.raises(ConfigError, match=r"neftune_noise_alpha=5\.0 is not used"):
        arguments_of(config)


def test_the_written_file_is_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(options.template().replace("path: null", "path: p").replace("dir: null", "dir: d"))
    made = TrainConfig.of(path, {})
    assert made == TrainConfig.of(None, {"data": "p", "model": "p", "output_dir": "d"})


REFERENCE = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "reference.py"))


@pytest.mark.parametrize("name", REFERENCE["PAGES"])
def test_the_reference_is_made_of_the_options(name):
    page = REFERENCE["FOLDER"] / name
    assert page.read_text() == REFERENCE["PAGES"][name](), "python scripts/reference.py"


def test_every_option_has_help():
    for section in options.SECTIONS.values():
        assert all(f.metadata["help"] for f in dataclasses.fields(section))
