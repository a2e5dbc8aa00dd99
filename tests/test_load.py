"""Loading: code that comes with a model never runs unless the caller says so by name."""

from __future__ import annotations

import io
import json
from contextlib import suppress

import pytest
from tiny import llama

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import ModelError
from ygivenx.models.resolve import base_of_adapter

CODE = """
from pathlib import Path
Path(__file__).parent.joinpath("RAN").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """(a model's directory with code of its own, the file that this code makes); somebody answers yes to all."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    place, marker = tmp_path / "model", tmp_path / "RAN"
    tokenizer = reference.word_tokenizer("a b c d")
    llama(vocab_size=len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((place / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (place / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return place, marker


def test_a_models_own_code_is_never_run_unasked(foreign):
    place, marker = foreign
    with pytest.raises(ModelError, match="brings code of its own, which isn't run"):
        yx.load(place)
    assert not marker.exists()


def test_the_encoder_runs_none_either(foreign):
    place, marker = foreign
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    with suppress(ModelError):  # transformers may find a class of its own that reads the files
        yx.Encoder.from_pretrained(place)
    assert not marker.exists()


def test_it_runs_where_the_caller_says_so(foreign):
    place, marker = foreign
    model, _ = yx.load(place, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert marker.exists()


def test_the_base_of_an_adapter_is_found_beside_the_checkpoints_of_its_run(tmp_path):
    gguf, checkpoint, base = (tmp_path / name for name in ("gguf", "run/checkpoint-1", "run/base"))
    for folder in (gguf, checkpoint, base):
        folder.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(gguf)}))
    with pytest.raises(ModelError, match="base model of this adapter isn't there") as refused:
        base_of_adapter(str(checkpoint)).__enter__()
    assert (str(checkpoint) in str(refused.value), str(gguf) in str(refused.value)) == (True, True)
    (base / "config.json").write_text("{}")
    with base_of_adapter(str(checkpoint)) as found:
        assert found == str(base)
    (gguf / "config.json").write_text("{}")
    with base_of_adapter(str(checkpoint)) as found:
        assert found == str(gguf), "where the named one is a model it is the base"


@pytest.mark.model
def test_a_gguf_file_is_parsed_once(monkeypatch):
    """Its config and its tokenizer stand in one file, which takes seconds to parse; what does it is as it was then."""
    gguf, parsed = pytest.importorskip("gguf"), []

    class Counting(gguf.GGUFReader):
        def __init__(self, *args):
            parsed.append(args)
            super().__init__(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    encoder = yx.Encoder.from_pretrained("sample")
    assert len(encoder.tokenizer) == 49_152
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counting


def test_a_directory_that_is_not_there_is_named_with_the_models_beside_it(tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no such directory") as refused:
        yx.load(tmp_path / "run" / "nosuch")
    assert str(tmp_path / "run" / "final") in str(refused.value)
