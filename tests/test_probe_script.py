"""`ygx probe` finds the trainer inside somebody's script, and leaves transformers as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import transformers

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
    with pytest.raises(ConfigError, match="without calling train"):
        at_train(script, [], print)
    with pytest.raises(ConfigError, match="no such script"):
        at_train(tmp_path / "absent.py", [], print)


@pytest.mark.parametrize(("code", "told"), [("", "0"), ("3", "3"), ("'no data'", "no data")])
def test_a_script_that_exits_before_it_trains(tmp_path, code, told):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.exit({code})\n")
    with pytest.raises(ConfigError, match="without calling train") as caught:
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
