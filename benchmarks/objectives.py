"""A step of DPO and of GRPO from a forest, against the same without sharing, and against TRL's DPOTrainer.

    python benchmarks/objectives.py dpo [--rounds 5]
    python benchmarks/objectives.py grpo [--rounds 5]

SmolLM2-135M-Instruct, float32, random tokens, forward and backward without the optimiser. dpo: pairs with prompts of
400 tokens and two replies of 150; the reference is a copy of the model. grpo: a prompt of 400 tokens with eight
completions of 100, old log-probs and entropies from the same call. Contestants take turns in one process, with the
allocator keeping freed memory for all. `unshared` computes the same sequences with a first token of their own, so
that they share nothing. Lines go to benchmarks/results/objectives.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ygivenx as yx
from ygivenx.objectives import dpo, group_advantages, policy_gradient

RESULTS = Path(__file__).parent / "results" / "objectives.jsonl"
PROMPT, REPLY, PAIRS = 400, 150, 2
GROUP, COMPLETION = 8, 100


def replies(prompt: int, lengths: list[int], seed: int) -> list[yx.Sequence]:
    rng = np.random.default_rng(seed)
    x = rng.integers(1000, 40_000, prompt)
    return [
        yx.Sequence(np.concatenate((x, rng.integers(1000, 40_000, n))), np.repeat([0.0, 1.0], [prompt, n]))
        for n in lengths
    ]


def without_sharing(rows: list[yx.Sequence]) -> list[yx.Sequence]:
    return [yx.Sequence(np.concatenate(([100 + i], s.ids[1:])), s.weights) for i, s in enumerate(rows)]


def dpo_step(model: Any, reference: Any, rows: list[yx.Sequence]) -> float:
    batch = yx.Targets.of(rows)
    with torch.no_grad():
        before = yx.log_probs(reference, batch).sums()
    after = yx.log_probs(model, batch).sums()
    loss = dpo(after[0::2], after[1::2], before[0::2], before[1::2], beta=0.1).mean()
    loss.backward()
    return loss.item()


def trl_step(model: Any, reference: Any, rows: list[yx.Sequence], tokenizer: Any) -> Callable[[], float]:
    """TRL's own loss on its own padded batch, chosen first; here all rows have one length, so nothing is padded."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig("runs/benchmark", report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False)
    pair = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = DPOTrainer(model, reference, args=args, train_dataset=pair, processing_class=tokenizer)
    ids, mask = (
        torch.from_numpy(np.stack([getattr(s, name) for s in (*rows[0::2], *rows[1::2])]))
        for name in ("ids", "weights")
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long()}

    def step() -> float:
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        return loss.item()

    return step


def grpo_step(model: Any, rows: list[yx.Sequence]) -> float:
    policy = yx.log_probs(model, rows, entropy=True)
    rewards = torch.linspace(0, 1, len(rows))
    loss = policy_gradient(policy, group_advantages(rewards, len(rows)), policy.log_p.detach())
    loss.backward()
    return loss.item()


def in_turns(contestants: dict[str, Callable[[], float]], model: Any, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):  # the first round warms up
        for name, step in contestants.items():
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("dpo", "grpo"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    yx.keep_freed_memory()
    model, tokenizer = yx.load("sample")
    contestants: dict[str, Callable[[], float]]
    if args.case == "dpo":
        reference = copy.deepcopy(model)
        rows = [s for seed in range(PAIRS) for s in replies(PROMPT, [REPLY, REPLY], seed)]
        contestants = {
            "forest": lambda: dpo_step(model, reference, rows),
            "unshared": lambda: dpo_step(model, reference, without_sharing(rows)),
            "trl": trl_step(model, reference, rows, tokenizer),
        }
    else:
        rows = replies(PROMPT, [COMPLETION] * GROUP, 0)
        contestants = {
            "forest": lambda: grpo_step(model, rows),
            "unshared": lambda: grpo_step(model, without_sharing(rows)),
        }
    seconds = in_turns(contestants, model, args.rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    forest = yx.Forest.of(rows)
    record = {
        "case": args.case, "limit": forest.total / len(forest), "seconds": seconds,
        "ratios": {name: value / median["forest"] for name, value in median.items()},
        "threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    with RESULTS.open("a") as out:
        out.write(json.dumps(record) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "seconds"}, indent=1))


if __name__ == "__main__":
    main()
