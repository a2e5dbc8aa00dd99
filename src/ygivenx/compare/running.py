"""Child processes that run a trainer's preprocessing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..proof.evidence import ObservedRow
from ..proof.prepared import observed
from .trainers import trainer_of

FOLDER = Path(__file__).parent
# What a chat template of each family writes, by which trainers with templates of their own choose one.
FAMILIES = {
    "<|start_header_id|>": "llama3",
    "<|channel|>": "gpt_oss",
    "<start_of_turn>": "gemma3",
    "</think>": "qwen3",
    "<|im_start|>": "chatml",
}


@dataclass(frozen=True)
class Preprocessed:
    """What a trainer made of one row: ids and weights as it would train them, or why it made nothing."""

    trainer: str
    setting: str
    row: int
    ids: np.ndarray
    weights: np.ndarray
    error: str = ""

    def observed(self) -> ObservedRow:
        """For the audit."""
        record = {"input_ids": self.ids, "weights": self.weights}
        seen = observed(record, number=self.row)
        seen.place = f"{self.trainer} ({self.setting}), row {self.row}"
        return seen


def family_of(template: Any) -> str:
    """The family of a chat template; "chatml" for one of no known family."""
    return next((family for mark, family in FAMILIES.items() if mark in str(template)), "chatml")


def run(
    trainer: str,
    setting: str,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    place: str = "",
    limit: int = 300,
) -> list[Preprocessed]:
    """What a trainer makes of rows with `messages`, and perhaps `tools`, under a tokenizer with a chat template.

    place: where the trainer is installed: a Python, or a folder of `pip install --target`, several separated as in
    PYTHONPATH; by default this Python. limit: seconds. Raises ConfigError where it can't be run at all.
    """
    settings = trainer_of(trainer).settings[setting]
    python, path = _python(place)
    task = {"family": family_of(tokenizer.chat_template), "rows": list(rows), "settings": dict(settings)}
    adapter = FOLDER / "adapters" / f"{trainer.replace('-', '_')}.py"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        tokenizer.save_pretrained(Path(folder) / "tokenizer")
        file.write_text(json.dumps({**task, "tokenizer": f"{folder}/tokenizer"}), encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [python, str(FOLDER / "child.py"), str(adapter), str(file)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=limit, cwd=folder
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{trainer} took more than {limit} s") from None
    lines = done.stdout.splitlines()
    if len(lines) != len(rows):
        printed = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(
            f"{trainer} can't be run",
            where=place or sys.executable,
            why=printed[-1] if printed else f"it ended with {done.returncode}",
            fix=f"give the place where {trainer_of(trainer).package} is installed: --with {trainer}=PLACE",
        )
    return [_result(trainer, setting, n, json.loads(line)) for n, line in enumerate(lines)]


def _result(trainer: str, setting: str, row: int, line: Mapping[str, Any]) -> Preprocessed:
    ids, weights = np.array(line.get("ids", []), np.int64), np.array(line.get("weights", []), np.float64)
    return Preprocessed(
        trainer, setting, row, ids, weights, line.get("error", "" if len(ids) else "nothing was made of it")
    )


def _python(place: str) -> tuple[str, str]:
    """(the Python to run, its PYTHONPATH)."""
    if not place:
        return sys.executable, os.environ.get("PYTHONPATH", "")
    for file in (Path(place), Path(place) / "bin" / "python"):
        if file.is_file():
            return str(file.absolute()), ""
    if not all(Path(p).is_dir() for p in place.split(os.pathsep)):
        raise ConfigError(
            "no Python and no folder", where=place, fix="a venv, or a folder of pip install --target"
        )
    return sys.executable, os.pathsep.join(str(Path(p).absolute()) for p in place.split(os.pathsep))
