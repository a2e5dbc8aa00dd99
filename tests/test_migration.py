"""What other tools call the options of a run: their names exist there, ours exist here."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from ygivenx.commands import migration
from ygivenx.commands.config import SECTIONS, TrainConfig
from ygivenx.encoder.encode import OPTIONS
from ygivenx.errors import ConfigError

FURTHER = {
    "lora": {f.name for f in fields(LoraConfig)},
    "training": {f.name for f in fields(TrainingArguments)},
    "encoder": set(OPTIONS),
}
ENTRIES = [(tool, *entry) for tool, table in migration.TOOLS.items() for entry in table.items()]


@pytest.mark.parametrize(("tool", "name", "ours"), ENTRIES, ids=[f"{e[0]} {e[1]}" for e in ENTRIES])
def test_what_is_said_to_work_is_an_option(tool, name, ours):
    if ours[0] in "-?":
        assert len(ours) > 5
        return
    for key in ours.partition(" (")[0].split(", "):
        section, option = key.split(".")
        assert option in {f.name for f in fields(SECTIONS[section])} | FURTHER.get(section, set())


REFUSED = {name: ours for _, name, ours in ENTRIES if ours[0] in "-?"}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["a flat key", "training", "model"])
def test_what_is_refused_or_missing_says_why(name, place):
    given = {name: "x"} if place == "a flat key" else {place: {name: "x"}}
    with pytest.raises(ConfigError) as e:
        TrainConfig.of(None, {"data": "rows.jsonl", "output_dir": "run"} | given)
    assert repr(name) in str(e.value)
    assert REFUSED[name][2:] in str(e.value)


@pytest.mark.parametrize("table", migration.TOOLS.values(), ids=migration.TOOLS)
def test_at_most_a_tenth_of_forty_options_is_missing(table):
    assert len(table) == 40
    assert sum(ours.startswith("?") for ours in table.values()) <= 4


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_the_names_are_trls():
    from trl import ModelConfig, ScriptArguments, SFTConfig

    assert migration.TRL.keys() <= {
        f.name for c in (ModelConfig, ScriptArguments, SFTConfig) for f in fields(c)
    }


def test_a_name_of_another_tool_is_told_what_it_is_called_here():
    with pytest.raises(ConfigError, match=r"base_model(.|\n)*model\.path"):
        TrainConfig.of(None, {"base_model": "sample"})
    with pytest.raises(ConfigError, match=r"sequence_len(.|\n)*encoder\.max_length"):
        TrainConfig.of(None, {"encoder": {"sequence_len": 4}})
