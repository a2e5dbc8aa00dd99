"""A run of 60 steps, stopped after each of them and resumed: are the weights the same bits as those of one run?

Full and LoRA, packed alone and shared, two micro-batches a step, dropout, with 0 and 2 workers of the DataLoader; and
two ranks over gloo. Each resumed run goes on for one step, whose weights are compared with those of the straight run
after it; what is bitwise equal after each single step is equal at the end. A sample of steps is run to the end as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).parents[1] / "tests"
STEPS = 60
CASES = {
    "full, packed": {},
    "full, shared prefixes": {"shared": True},
    "full, dropout": {"dropout": 0.1},
    "full, two workers": {"workers": 2, "dropout": 0.1},
    "LoRA with dropout, shared prefixes": {"lora": True, "shared": True},
}


def rows(shared: bool) -> list[Any]:
    """46 sequences; if shared, groups of three begin alike."""
    from tiny import sequences

    from ygivenx import Sequence

    data = sequences(46, seed=4)
    if not shared:
        return data
    alike = [np.concatenate([data[i - i % 3].ids[:4], s.ids[4:]]) for i, s in enumerate(data)]
    return [Sequence(ids, s.weights, s.segments) for ids, s in zip(alike, data, strict=True)]


def trainer(folder: Path, steps: int, case: dict[str, Any]) -> Any:
    """A Trainer whose learning rate doesn't look at the end of the run, so that a shorter one goes the same way."""
    from tiny import llama
    from transformers import PrinterCallback, TrainingArguments

    import ygivenx as yx

    model = llama(attention_dropout=case.get("dropout", 0.0))
    if case.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    args = TrainingArguments(
        str(folder), report_to=[], disable_tqdm=True, use_cpu=True, seed=1, max_steps=steps, save_steps=1,
        gradient_accumulation_steps=2, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=20,
        dataloader_num_workers=case.get("workers", 0), save_strategy="steps",
    )  # fmt: skip
    made = yx.Trainer(model=model, args=args, train_dataset=rows(case.get("shared", False)), max_tokens=64)
    made.remove_callback(PrinterCallback)
    return made


def weights(directory: Path) -> bytes:
    (path,) = [p for p in directory.iterdir() if p.suffix == ".safetensors"]
    return path.read_bytes()


def resumed(straight: Path, step: int, until: int, case: dict[str, Any]) -> bool:
    """Whether a run that is taken up after `step` has the same weights and optimiser after `until`."""
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder)
        shutil.copytree(straight / f"checkpoint-{step}", again / f"checkpoint-{step}")
        torch.manual_seed(step)  # what a fresh process would have: another state
        trainer(again, until, case).train(resume_from_checkpoint="auto")
        ends = [at / f"checkpoint-{until}" for at in (straight, again)]
        states = [torch.load(end / "optimizer.pt", weights_only=True)["state"] for end in ends]
        same = all(
            torch.equal(a[k], b[k]) for a, b in zip(*(s.values() for s in states), strict=True) for k in a
        )
        return same and weights(ends[0]) == weights(ends[1])


def run(scale: float = 1.0) -> dict[str, Any]:
    """Steps that were resumed from, by case; `bad` lists those after which a bit differs."""
    sys.path.insert(0, str(TESTS))
    bad, counts = [], {}
    steps = STEPS if scale == 1 else max(4, round(STEPS * scale))
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            straight = Path(folder)
            trainer(straight, steps, case).train()
            ways = [(step, step + 1) for step in range(1, steps)]
            ways += [(step, steps) for step in range(1, steps - 1, max(1, steps // 4))]
            counts[name] = len(ways)
            bad += [
                f"{name}: {step} to {until}"
                for step, until in ways
                if not resumed(straight, step, until, case)
            ]
    counts["two ranks"] = 1
    if not ranks():
        bad.append("two ranks")
    return {"steps": steps, "resumed": counts, "bad": bad}


def ranks() -> bool:
    """The resumed runs of tests/test_ranks.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "full or not full"]
    done = subprocess.run(
        [*command, str(TESTS / "test_ranks.py"), "-k", "resum"],
        cwd=TESTS.parent, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    return done.returncode == 0
