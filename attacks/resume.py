"""A run of 60 steps, stopped after each of them and resumed: are its checkpoints the same bits as those of one run?

Full and LoRA, packed alone and shared, with 0 and 2 workers of the DataLoader; two micro-batches a step and dropout in
all of them; and two ranks over gloo. What is resumed goes on for one step, after which weights, optimiser, schedule and
the state of every random generator have to be those of the straight run: what is equal after each single step is equal
at the end. Some are run to the end as well.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

TESTS = Path(__file__).parents[1] / "tests"
STEPS = 60
CASES = {
    f"{kind}, {packing}, {workers} workers": {"lora": kind == "LoRA", "shared": packing != "packed"}
    | {"dropout": 0.1, "workers": workers}
    for kind, packing, workers in product(("full", "LoRA"), ("packed", "shared prefixes"), (0, 2))
}
RANKS = "two ranks"
RANKED = ("full, packed, 0 workers", "LoRA, shared prefixes, 0 workers")
COMPARED = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")


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
        gradient_accumulation_steps=2, learning_rate=1e-3, lr_scheduler_type="constant_with_warmup",
        warmup_steps=9, logging_steps=20, dataloader_num_workers=case.get("workers", 0), save_strategy="steps",
        save_total_limit=case.get("keep"),
    )  # fmt: skip
    made = yx.Trainer(model=model, args=args, train_dataset=rows(case.get("shared", False)), max_tokens=64)
    made.remove_callback(PrinterCallback)
    return made


def weights(directory: Path) -> bytes:
    (path,) = [p for p in directory.iterdir() if p.suffix == ".safetensors"]
    return path.read_bytes()


def state(directory: Path) -> dict[str, bytes]:
    """The bytes of all files that a run goes on from."""
    return {p.name: p.read_bytes() for pattern in COMPARED for p in directory.glob(pattern)}


def differs(straight: Path, step: int, until: int, case: dict[str, Any]) -> list[str]:
    """The files of checkpoint `until` that have other bytes where the run is taken up after `step`."""
    with _folder() as again:
        if PartialState().is_main_process:
            shutil.copytree(straight / f"checkpoint-{step}", again / f"checkpoint-{step}")
        PartialState().wait_for_everyone()
        torch.manual_seed(step)  # what a fresh process would have: another state
        trainer(again, until, case).train(resume_from_checkpoint="auto")
        PartialState().wait_for_everyone()
        one, other = (state(at / f"checkpoint-{until}") for at in (straight, again))
        return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


class _folder:
    """A temporary directory that all ranks share."""

    def __enter__(self) -> Path:
        PartialState(
            cpu=True
        )  # before anything else is asked of it: else each rank takes itself for the only one
        self.path = [tempfile.mkdtemp()] if PartialState().is_main_process else [""]
        return Path(broadcast_object_list(self.path)[0])

    def __exit__(self, *_: object) -> None:
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(self.path[0])


def resumed(case: dict[str, Any], steps: int) -> Iterator[str]:
    """For each time that a run was resumed: an empty text, or what differs."""
    with _folder() as straight:
        trainer(straight, steps, case).train()
        ways = [(step, step + 1) for step in range(1, steps)]
        ways += [(step, steps) for step in range(1, steps - 1, max(1, steps // 4))]
        for step, until in ways:
            found = differs(straight, step, until, case)
            yield f"{step} to {until}: {', '.join(found)}" if found else ""


def cases(names: Any, steps: int) -> tuple[dict[str, int], list[str]]:
    """How often the run of each case was resumed, and what differed."""
    sys.path.insert(0, str(TESTS))
    gc.collect()
    gc.freeze()  # accelerate collects garbage in each run: without what was imported it takes no time
    counts, bad = {}, []
    for name in names:
        found = list(resumed(CASES[name], steps))
        counts[name] = len(found)
        bad += [f"{name}: {f}" for f in found if f]
    return counts, bad


def run(scale: float = 1.0, only: str = "") -> dict[str, Any]:
    """How often runs were resumed, by case; `bad` lists those after which a bit differs."""
    steps = max(4, round(STEPS * scale))
    counts, bad = cases([name for name in CASES if only in name], steps)
    ranked = [name for name in RANKED if f"{RANKS}: {name}".startswith(only)]
    if not ranked:
        return {"steps": steps, "resumed": counts, "bad": bad}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run(
            [*launch, "-m", "attacks.resume", str(steps), out.name, *ranked], check=True, capture_output=True,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        of_ranks, worse = json.loads(Path(out.name).read_text())
    counts |= {f"{RANKS}: {name}": n for name, n in of_ranks.items()}
    return {"steps": steps, "resumed": counts, "bad": [*bad, *(f"{RANKS}: {b}" for b in worse)]}


def on_a_rank(steps: int, out: Path, names: list[str]) -> None:
    """What each of several ranks does; the first one writes what was found."""
    found = cases(names, steps)
    if PartialState().is_main_process:
        out.write_text(json.dumps(found))
    gc.collect()  # the wrappers of models have to be gone before their group is: see Trainer.end_ranks
    PartialState().destroy_process_group()


if __name__ == "__main__":
    on_a_rank(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
