"""Tokens of y per second of whole training steps on GSM8K, against transformers' Trainer and TRL's SFTTrainer.

    python benchmarks/trainers.py run CONTESTANT
    python benchmarks/trainers.py table

SmolLM2-135M-Instruct, float32, AdamW, no evaluation, no checkpoints; the same rows for everyone, 16 to a batch (packs
of 16 times the mean length for ours). Each
contestant runs in a process of its own and trains on the answers alone; the clock runs from the end of the first step
to the end of the last, and counts the tokens of y of these steps. `grouped` puts rows of similar length together
(transformers' own sampler); `chunked` is TRL's fused loss; `kept` has the allocator keep freed memory, as ours does
by itself (`yx.keep_freed_memory`). Lines go to benchmarks/results/trainers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import ygivenx as yx
from ygivenx.models.resolve import sample_model_path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trainers.jsonl"
ROWS, BATCH = 96, 16


class Clock(TrainerCallback):
    """When each optimiser step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def questions() -> list[dict[str, str]]:
    path = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:ROWS]]


def arguments(kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> Any:
    return kind(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-5,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
        dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(), **more,
    )  # fmt: skip


def timed(trainer: Any, tokens_of_step: Callable[[int], int]) -> dict[str, Any]:
    """Train, and count from the end of the first step on."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    seconds = clock.ends[-1] - clock.ends[0]
    y = sum(tokens_of_step(i) for i in range(1, len(clock.ends)))
    return {
        "steps": len(clock.ends) - 1,
        "seconds": seconds,
        "y_tokens": y,
        "y_tokens_per_second": y / seconds,
    }


def ours(model: Any, tokenizer: Any) -> dict[str, Any]:
    examples, rejected = yx.Encoder(tokenizer).batch(questions())
    assert not rejected
    mean = statistics.mean(len(s) for e in examples for s in e)
    trainer = yx.Trainer(
        model=model, args=arguments(), train_dataset=examples, max_tokens=round(BATCH * mean)
    )
    packs = trainer.train_dataset
    order = list(trainer._get_train_sampler())
    result = timed(trainer, lambda i: int((packs[order[i]]["forest"].weight > 0).sum()))
    return result | {"rows_per_step": len(packs.plan.members) / len(packs)}


def encoded(tokenizer: Any) -> list[dict[str, Any]]:
    examples, _ = yx.Encoder(tokenizer).batch(questions())
    return [{"input_ids": e.only.ids.tolist(), "labels": e.only.labels.tolist()} for e in examples]


def by_transformers(model: Any, tokenizer: Any, **more: Any) -> dict[str, Any]:
    rows = encoded(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    seen: list[int] = []
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)

    def counted(batch: list[dict[str, Any]]) -> Any:
        seen.append(sum(label != -100 for row in batch for label in row["labels"]))
        return collate(batch)

    trainer = transformers.Trainer(
        model=model, args=arguments(**more), train_dataset=rows, data_collator=counted
    )
    return timed(trainer, lambda i: seen[i])


def by_trl(model: Any, tokenizer: Any, **more: Any) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": q["question"]}],
            "completion": [{"role": "assistant", "content": q["answer"]}],
        }
        for q in questions()
    ]
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, max_length=None, gradient_checkpointing=False, bf16=False, **more),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    seen: list[int] = []
    collate = trainer.data_collator

    def counted(batch: Any) -> Any:
        out = collate(batch)
        seen.append(int((out["labels"] != -100).sum()))
        return out

    trainer.data_collator = counted
    return timed(trainer, lambda i: seen[i])


def kept(run: Callable[..., dict[str, Any]], *args: Any, **more: Any) -> dict[str, Any]:
    """A peer in a process that keeps freed memory: not its default, but its best here."""
    assert yx.keep_freed_memory()
    return run(*args, **more)


CONTESTANTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "ours": ours,
    "transformers": by_transformers,
    "transformers_grouped": lambda m, t: by_transformers(m, t, train_sampling_strategy="group_by_length"),
    "transformers_grouped_kept": lambda m, t: kept(
        by_transformers, m, t, train_sampling_strategy="group_by_length"
    ),
    "trl": by_trl,
    "trl_chunked": lambda m, t: by_trl(m, t, loss_type="chunked_nll"),
    "trl_grouped_chunked": lambda m, t: by_trl(
        m, t, loss_type="chunked_nll", train_sampling_strategy="group_by_length"
    ),
    "trl_grouped_chunked_kept": lambda m, t: kept(
        by_trl, m, t, loss_type="chunked_nll", train_sampling_strategy="group_by_length"
    ),
}


def table(results: Path) -> str:
    """The latest line of each contestant."""
    latest = {r["contestant"]: r for r in map(json.loads, results.read_text().splitlines())}
    base = latest["ours"]["y_tokens_per_second"]
    lines = ["| trainer | tokens of y per second | ours is faster by |", "|---|---|---|"]
    lines += [
        f"| {name.replace('_', ', ')} | {r['y_tokens_per_second']:.0f} | {base / r['y_tokens_per_second']:.2f}× |"
        for name, r in latest.items()
    ]
    return "\n".join(lines)


def main() -> None:
    global ROWS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("contestant", nargs="?", choices=CONTESTANTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=int, default=ROWS)
    args = parser.parse_args()
    ROWS = args.rows
    if args.what == "table":
        print(table(args.out))
        return
    path, gguf_file = sample_model_path()
    model, tokenizer = yx.load(path, gguf_file=gguf_file)
    told = {
        "contestant": args.contestant,
        "command": "python " + " ".join(sys.argv),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    told |= CONTESTANTS[args.contestant](model, tokenizer)
    print(json.dumps(told))
    with args.out.open("a") as out:
        out.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
