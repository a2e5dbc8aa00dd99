"""`ygx probe` finds the trainer inside somebody's script, and leaves transformers as it was."""

from __future__ import annotations

import sys

import pytest
import transformers

from ygivenx.commands.onlooker import trainer_of
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
    trainer = trainer_of(tmp_path / "script.py", ["--steps", "7"])
    assert trainer.steps == 7
    assert not out.exists()
    assert (transformers.Trainer.train, sys.argv, sys.path) == (train, argv, path)


def test_a_script_that_never_trains(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="without calling train"):
        trainer_of(script, [])
    with pytest.raises(ConfigError, match="no such script"):
        trainer_of(tmp_path / "absent.py", [])
