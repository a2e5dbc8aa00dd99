"""What comes after training: adapters that load from anywhere, merging, generating; a card without paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import model_in, rows_in, train
from transformers import AutoModelForCausalLM

import ygivenx as yx
from ygivenx.commands import adapters
from ygivenx.commands.config import Sampling, Weights
from ygivenx.commands.generate import replies
from ygivenx.errors import ConfigError

# peft 0.21 asks transformers by a name that it gave up.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(output directory, base model's directory) of a short LoRA run."""
    pytest.importorskip("peft", reason="the extra lora is not installed")
    folder = tmp_path_factory.mktemp("lora")
    settings = {
        "data": rows_in(folder / "rows.jsonl"), "model": model_in(folder / "model"), "max_tokens": 64,
        "output_dir": str(folder / "run"), "max_steps": 4, "learning_rate": 1e-2,
        "lora": {"r": 4, "use_rslora": True, "modules_to_save": ["lm_head"]},
    }  # fmt: skip
    _, said = train(settings)
    assert f"ygx generate --model {folder / 'run' / 'final'}" in said
    assert f"ygx merge {folder / 'run' / 'final'}" in said
    return folder / "run", folder / "model"


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5)[None]).logits


def test_an_adapter_loads_from_anywhere(run, tmp_path, monkeypatch):
    import peft

    output, base = run
    final = output.rename(output.with_name("moved")) / "final"
    try:
        base.rename(base.with_name("gone"))  # the run's folder is all that is left
        monkeypatch.chdir(tmp_path)
        ours = logits(yx.load(final)[0])
        theirs = logits(AutoModelForCausalLM.from_pretrained(final))
        plain = AutoModelForCausalLM.from_pretrained(base.with_name("gone"))
        assert not torch.allclose(ours, logits(plain), atol=1e-2)
        alone = peft.PeftModel.from_pretrained(plain, str(final))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours, logits(alone))
        adapters.merge(str(final), tmp_path / "merged", torch.float32)
        torch.testing.assert_close(logits(yx.load(tmp_path / "merged")[0]), ours)
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
        with pytest.raises(ConfigError, match="isn't empty"):
            adapters.merge(str(final), tmp_path / "merged", torch.float32)
    finally:
        base.with_name("gone").rename(base)
        final.parent.rename(output)


def test_nothing_that_is_kept_names_a_path_of_this_machine(run):
    output, _ = run
    files = [p for p in (output / "final").iterdir() if p.suffix in (".json", ".md", ".jinja")]
    assert {"README.md", "adapter_config.json", "config.json"} <= {p.name for p in files}
    for path in files:
        assert str(output.parent) not in path.read_text(), path
    assert not list((output / "final").glob("*.bin"))
    assert (
        json.loads((output / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    )


def test_the_card_says_what_was_trained(run):
    card = (run[0] / "final" / "README.md").read_text()
    assert "| rows | rows.jsonl: 6 accepted, 0 quarantined of 6 |" in card
    assert "transformers" in card


def test_what_is_no_adapter_is_not_merged(tmp_path):
    with pytest.raises(ConfigError, match="there is no adapter"):
        adapters.merge(str(tmp_path), tmp_path / "out", torch.float32)


def test_a_plain_model_has_nothing_to_merge(tmp_path):
    with pytest.raises(ConfigError, match="nothing to merge"):
        adapters.merge(str(model_in(tmp_path / "model")), tmp_path / "out", torch.float32)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_transformers_own(tmp_path, temperature, capsys, monkeypatch):
    place = model_in(tmp_path / "model")
    model, tokenizer = yx.load(place)
    sampling = Sampling(max_new_tokens=5, temperature=temperature, seed=3, system="Be short.")
    (told,) = replies(Weights(place), sampling, ["What is 1+1?"])
    assert told["reply"] in capsys.readouterr().out
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 1+1?"}]
    batch = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(3)
    options = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
    ids = model.generate(
        **batch, do_sample=temperature > 0, max_new_tokens=5, eos_token_id=stop, pad_token_id=0, **options
    )
    expected = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert told["reply"] == expected
    again, other = replies(Weights(place), sampling, ["What is 1+1?", "And?"], silent=True)
    assert (again["reply"], other["prompt"]) == (expected, "And?")
    assert capsys.readouterr().out == ""


def test_a_reply_ends_where_replies_were_trained_to_end(tmp_path):
    place = model_in(tmp_path / "model")
    model, tokenizer = yx.load(place)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # a model that writes nothing else
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[stop] = 1
    from ygivenx.commands.config import EncoderSection
    from ygivenx.commands.generate import reply, stop_ids
    from ygivenx.commands.inputs import open_encoder

    stops = stop_ids(model, open_encoder(Weights(place), EncoderSection()))
    assert stop in stops
    assert reply(model, tokenizer, [{"role": "user", "content": "Hi"}], Sampling(), stops) == ""


def test_a_chat_comes_from_standard_input(tmp_path, monkeypatch):
    import io

    place = model_in(tmp_path / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nAnd now?\n"))
    first, second = replies(Weights(place), Sampling(max_new_tokens=3), None, silent=True)
    assert (first["prompt"], second["prompt"]) == ("Hi", "And now?")
    assert Path(place).is_dir()


@pytest.mark.full
@pytest.mark.model
def test_lora_on_200_rows_of_gsm8k_from_the_command_to_a_reply(data_dir, tmp_path):
    """As a user would: `ygx train`, the `ygx generate` that its last lines name, `ygx merge`."""

    def ygx(*arguments: object) -> tuple[Any, str]:
        command = [sys.executable, "-m", "ygivenx", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout), done.stderr

    result, said = ygx(
        "train", "--data", data_dir / "gsm8k" / "train.jsonl", "--model", "sample", "--lora", 8, "--limit", 200,
        "--max-steps", 12, "--max-tokens", 1024, "--logging-steps", 3, "--output-dir", "run",
    )  # fmt: skip
    assert (result["accepted"], result["quarantined"], result["steps"]) == (200, 0, 12)
    assert result["losses"][-1] < result["losses"][0]
    (line,) = [t for t in map(str.strip, said.splitlines()) if t.startswith("ygx generate")]
    ((reply,), _) = ygx(*line.split()[1:4], "--prompt", "What is 3 + 4?", "--max-new-tokens", 40)
    assert reply["reply"].strip()
    ygx("merge", "run/final", "--output", "merged")
    merged, adapted, base = (
        logits(yx.load(p)[0]) for p in (tmp_path / "merged", tmp_path / "run/final", "sample")
    )
    torch.testing.assert_close(merged, adapted, atol=1e-3, rtol=1e-3)
    assert (base - adapted).abs().max() > 0.1
