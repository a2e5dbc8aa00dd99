"""`ygx probe` finds the trainer or the loop in a script or command, and leaves torch and transformers as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from ygivenx import cli
from ygivenx.commands.probe_script import at_train
from ygivenx.errors import ConfigError

SCRIPT = """
import sys
from pathlib import Path
import transformers
from helper_module import OUT

class Dummy(transformers.Trainer):
    def __init__(self, steps):
        self.steps = steps

if __name__ == "__main__":
    try:
        Dummy(int(sys.argv[2])).train(resume_from_checkpoint=False)
    except Exception:
        print("must not be swallowed")
    Path(OUT).write_text("ran on")
"""


def test_the_trainer_is_found_and_nothing_after_train_runs(tmp_path):
    out = tmp_path / "after.txt"
    (tmp_path / "helper_module.py").write_text(f"OUT = {str(out)!r}\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    train, argv, path = transformers.Trainer.train, sys.argv, list(sys.path)
    assert at_train(tmp_path / "script.py", ["--steps", "7"], lambda trainer: trainer.steps) == 7
    assert not out.exists()
    assert (transformers.Trainer.train, sys.argv, sys.path) == (train, argv, path)


def test_a_script_that_never_trains(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="without training"):
        at_train(script, [], print)
    with pytest.raises(ConfigError, match="no such script or command"):
        at_train(tmp_path / "absent.py", [], print)


@pytest.mark.parametrize(("code", "told"), [("", "0"), ("3", "3"), ("'no data'", "no data")])
def test_a_script_that_exits_before_it_trains(tmp_path, code, told):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.exit({code})\n")
    with pytest.raises(ConfigError, match="without training") as caught:
        at_train(script, [], print)
    assert caught.value.why.startswith(f"it exited with {told};")


def test_a_script_that_goes_elsewhere_leaves_us_where_we_were(tmp_path):
    """What is written after it, such as `--html probe.html`, has a place relative to ours."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, transformers\nos.chdir({str(tmp_path)!r})\n"
        "transformers.Trainer.__new__(transformers.Trainer).train()\n"
    )
    here = os.getcwd()
    assert at_train(script, [], lambda trainer: os.getcwd()) == str(tmp_path)
    assert os.getcwd() == here


HEAD = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
ids = torch.arange(9)[None]
labels = ids.where(ids >= 4, -100)
optimizer = torch.optim.AdamW(model.parameters())
with torch.no_grad():
    model(ids)  # an evaluation comes first
"""
END = "\nPath(sys.argv[1]).touch()\n"
ACCELERATE = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, optimizer)
for _ in range(2):
    with accelerator.accumulate(model):
        accelerator.backward(model(input_ids=ids, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()
"""
OWN = """
from torch import nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.lm_head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)
    def forward(self, idx):
        return self.lm_head(self.mix(self.embed(idx)))
model = Own()
optimizer = torch.optim.SGD(model.parameters())
loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
loss.backward()
optimizer.step()
"""
LIGHTNING = """
import lightning
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model
    def training_step(self, batch, _):
        return self.model(input_ids=batch[0], labels=batch[1]).loss
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, labels))
options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
lightning.Trainer(max_steps=1, **options).fit(Module(), data)
"""
DEEPSPEED = """
import deepspeed, os
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
deepspeed.init_distributed("gloo")
config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.backward(engine(input_ids=ids, labels=labels).loss)
engine.step()
"""
LOOPS = {
    "a plain loop": ("", "model(input_ids=ids, labels=labels).loss.backward()\noptimizer.step()"),
    "backward alone": ("", "model(input_ids=ids, labels=labels).loss.backward()"),
    "accelerate": ("", ACCELERATE),
    "a model of one's own": ("", OWN),
    "Lightning": ("lightning", LIGHTNING),
    "DeepSpeed": ("deepspeed", DEEPSPEED),
}


@pytest.mark.filterwarnings("ignore")  # of the libraries' own plans
@pytest.mark.parametrize("name", LOOPS)
def test_the_first_step_of_any_loop_is_found(name, tmp_path):
    """What is trained is read from its gradient; behind the first step nothing runs."""
    library, loop = LOOPS[name]
    if library:
        pytest.importorskip(library)
    script, after = tmp_path / "script.py", tmp_path / "after"
    script.write_text(HEAD + loop + END)
    call, train = torch.nn.Module.__call__, transformers.Trainer.train
    found = at_train(
        script, [str(after)], lambda step: [(t.position, t.target) for t in step.probe.trained()]
    )
    assert found == [(i, i) for i in range(4, 9)]
    assert after.exists() == (name == "backward alone")
    assert (torch.nn.Module.__call__, transformers.Trainer.train) == (call, train)


def test_a_loop_is_audited_with_rows_and_without(smol_tokenizer, tmp_path):
    messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]
    ids = smol_tokenizer.apply_chat_template(messages, return_dict=False)
    smol_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    loop = HEAD.replace("vocab_size=50", f"vocab_size={len(smol_tokenizer)}").replace(
        "torch.arange(9)[None]", f"torch.tensor({[ids]})"
    )
    (tmp_path / "loop.py").write_text(
        loop + "model(input_ids=ids, labels=ids).loss.backward()\noptimizer.step()\n"
    )
    command = ["probe", "--json", "--tokenizer", str(tmp_path / "model")]
    for rows in ([], ["--data", str(tmp_path / "rows.jsonl")]):
        result = CliRunner().invoke(cli.app, [*command, *rows, str(tmp_path / "loop.py")])
        assert result.exit_code == 1, result.output
        found = {f["rule"]: f for f in json.loads(result.stdout)["findings"]}
        assert {"loss-on-x", "prompt-header-trained"} <= found.keys()


@pytest.mark.full
def test_a_command_is_probed_in_whichever_process_trains(smol_tokenizer, tmp_path):
    """`trl sft` launches another process by accelerate, and that one trains."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(smol_tokenizer), **sizes))
    model.save_pretrained(tmp_path / "model")
    smol_tokenizer.save_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    options = {
        "model_name_or_path": "model",
        "dataset_name": "data",
        "output_dir": "out",
        "report_to": "none",
    }
    options |= {"use_cpu": "true", "bf16": "false", "max_steps": "1"}
    trl = [
        str(Path(sys.executable).with_name("trl")),
        "sft",
        *(x for k, v in options.items() for x in (f"--{k}", v)),
    ]
    command = [sys.executable, "-m", "ygivenx", "probe", "--json", "--html", "page.html", *trl]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "loss-on-x" in {f["rule"] for f in json.loads(done.stdout)["findings"]}
    assert (tmp_path / "page.html").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    idle = [sys.executable, "-m", "ygivenx", "probe", "true"]
    done = subprocess.run(idle, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ended with 0, without training" in done.stderr


@pytest.mark.full
def test_a_script_that_fails_is_no_finding(tmp_path):
    (tmp_path / "script.py").write_text("1 / 0\n")
    command = [sys.executable, "-m", "ygivenx", "probe", str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "script.py" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_an_error_of_the_script_is_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        at_train(script, [], print)


INSIDE = """
import sys, transformers
from pathlib import Path

class Dummy(transformers.Trainer):
    def __init__(self, path):
        self.path = path

path = Path(sys.argv[1])
try:
    with path.open("w") as kept_open:
        trainer = Dummy(kept_open)
        trainer.train()
except BaseException:
    pass  # a bare except stops anything
finally:
    path.unlink()
    sys.exit(1)
"""


def test_the_look_is_taken_before_the_script_cleans_up(tmp_path):
    script, data = tmp_path / "script.py", tmp_path / "data"
    script.write_text(INSIDE)

    def look(trainer):
        return not trainer.path.closed, data.exists(), sys.path[0], sys.modules["__main__"].path

    assert at_train(script, [str(data)], look) == (True, True, str(tmp_path), data)
    assert not data.exists()


def test_an_error_of_the_look_is_raised_whatever_the_script_catches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(INSIDE)

    def look(trainer):
        raise ConfigError("no rows")

    with pytest.raises(ConfigError, match="no rows"):
        at_train(script, [str(tmp_path / "data")], look)


REAL = """
import os, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print("chatter")
os.system("echo chatter of a child")
assert sys.argv[1:] == ["--json"], sys.argv
made = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)

class Broken(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * float("nan")

rows = [{"input_ids": list(range(9)), "labels": list(range(9))}] * 4
args = TrainingArguments(sys.path[0], use_cpu=True, report_to=[])
Broken(LlamaForCausalLM(made), args, train_dataset=rows).train()
"""


def test_standard_output_is_one_json_document(tmp_path):
    (tmp_path / "script.py").write_text(REAL)
    command = [sys.executable, "-m", "ygivenx", "probe", "--json", str(tmp_path / "script.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    report = json.loads(done.stdout, parse_constant=refuse)
    assert "not-finite" in {f["rule"] for f in report["findings"]}
    assert report["summary"]["Σ weights of the step"] is None
    assert "chatter\n" in done.stderr
    assert "chatter of a child" in done.stderr
