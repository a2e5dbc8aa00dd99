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
    settings: Sequence[str],
    tokenizers: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    place: str = "",
    limit: int = 300,
) -> list[Preprocessed]:
    """What a trainer makes of rows with `messages`, and perhaps `tools`, with each setting, under each tokenizer.

    tokenizers: with chat templates; results come tokenizer by tokenizer, setting by setting. place: where the trainer
    is installed: a Python, or a folder of `pip install --target`, several separated as in PYTHONPATH; by default this
    Python. limit: seconds. Raises ConfigError where it can't be run at all.
    """
    known = trainer_of(trainer).settings
    jobs = [(t, name) for t in tokenizers for name in settings]
    with tempfile.TemporaryDirectory() as folder:
        task: dict[str, Any] = {"rows": list(rows), "jobs": []}
        for n, (tokenizer, name) in enumerate(jobs):
            tokenizer.save_pretrained(Path(folder) / str(n))
            family = family_of(tokenizer.chat_template)
            task["jobs"].append(
                {"tokenizer": f"{folder}/{n}", "family": family, "settings": dict(known[name])}
            )
        done = _run_child(trainer, task, Path(folder), place, limit)
    lines = done.stdout.splitlines()
    if len(lines) != len(rows) * len(jobs):
        printed = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(
            f"{trainer} can't be run",
            where=place or sys.executable,
            why=printed[-1] if printed else f"it ended with {done.returncode}",
            fix=f"give the place where {trainer_of(trainer).package} is installed: --with {trainer}=PLACE",
        )
    of = [(name, n) for _, name in jobs for n in range(len(rows))]
    return [_result(trainer, name, n, json.loads(line)) for (name, n), line in zip(of, lines, strict=True)]


def _run_child(
    trainer: str, task: Mapping[str, Any], folder: Path, place: str, limit: int
) -> subprocess.CompletedProcess[str]:
    """`child.py` with a trainer's adapter, in its Python."""
    python, path = _python(place)
    adapter, file = FOLDER / "adapters" / f"{trainer.replace('-', '_')}.py", folder / "task.json"
    file.write_text(json.dumps(task), encoding="utf-8")
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, str(FOLDER / "child.py"), str(adapter), str(file)]
    try:
        return subprocess.run(
            command, env={**os.environ, **own}, capture_output=True, text=True, timeout=limit, cwd=folder
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{trainer} took more than {limit} s") from None


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
