"""A step of DPO and of GRPO from a forest, against the same without sharing, and against TRL's DPOTrainer.

    python benchmarks/objectives.py dpo [--seconds 240]
    python benchmarks/objectives.py grpo [--seconds 240]

SmolLM2-135M-Instruct, float32, random tokens, forward and backward without the optimiser. dpo: a pair with a prompt
of 400 tokens and two replies of 150; all have the reference's log-probabilities beforehand. grpo: a prompt of 400
tokens with eight completions of 50, old log-probs and entropies from the same call. Contestants take turns in one
process, with the allocator keeping freed memory for all, after a round that warms up, until the time is over.
`unshared` computes the same sequences with a first token of their own, so that they share nothing. `of_limit`: the
ratio to `unshared` divided by tokens per distinct token. `by_work`: the ratio of multiplications in linear layers, with
attention left out; TRL's padded batch computes all logits of both replies.
Lines go to benchmarks/results/objectives.jsonl.
"""

from __future__ import annotations

import argparse
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
PROMPT, REPLY = 400, 150
GROUP, COMPLETION = 8, 50


def replies(prompt: int, lengths: list[int], seed: int) -> list[yx.Sequence]:
    rng = np.random.default_rng(seed)
    x = rng.integers(1000, 40_000, prompt)
    return [
        yx.Sequence(np.concatenate((x, rng.integers(1000, 40_000, n))), np.repeat([0.0, 1.0], [prompt, n]))
        for n in lengths
    ]


def without_sharing(rows: list[yx.Sequence]) -> list[yx.Sequence]:
    return [yx.Sequence(np.concatenate(([100 + i], s.ids[1:])), s.weights) for i, s in enumerate(rows)]


def multiplications(model: Any, tokens: int, last_layer: int, logits: int) -> float:
    """Of the linear layers, forward: all layers but the last at every token, that one at those that are needed."""
    config = model.config
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = config.hidden_size * (2 * config.head_dim * heads + 3 * config.intermediate_size)
    return (
        layer * (tokens * (config.num_hidden_layers - 1) + last_layer) + logits * model.lm_head.weight.numel()
    )


def by_work(model: Any, rows: list[yx.Sequence]) -> dict[str, float]:
    """Multiplications of the other contestants, divided by those of the forest."""
    targets = yx.Targets.of(rows)
    needed, total = len(np.unique(targets.edges.rows)), targets.forest.total
    ours = multiplications(model, len(targets.forest), needed, needed)
    padded = len(rows) * max(map(len, rows))
    return {
        "unshared": multiplications(model, total, len(targets), len(targets)) / ours,
        "trl": multiplications(model, padded, padded, padded) / ours,
    }


def dpo_step(model: Any, reference: torch.Tensor, rows: list[yx.Sequence]) -> float:
    after = yx.log_probs(model, rows).sums()
    loss = dpo(after[0::2], after[1::2], reference[0::2], reference[1::2], beta=0.1).mean()
    loss.backward()
    return loss.item()


def trl_step(
    model: Any, reference: torch.Tensor, rows: list[yx.Sequence], tokenizer: Any
) -> Callable[[], float]:
    """TRL's own loss on its own padded batch, chosen first; here all rows have one length, so nothing is padded.

    precompute_ref_log_probs is TRL's fastest setting on a CPU: padding_free is out of order in TRL 1.16.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        "runs/benchmark", report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False,
        precompute_ref_log_probs=True,
    )  # fmt: skip
    pair = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = DPOTrainer(model, args=args, train_dataset=pair, processing_class=tokenizer)
    trainer.model.eval()
    ids, mask = (
        torch.from_numpy(np.stack([getattr(s, name) for s in (*rows[0::2], *rows[1::2])]))
        for name in ("ids", "weights")
    )
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long(),
        "ref_chosen_logps": reference[0::2], "ref_rejected_logps": reference[1::2],
    }  # fmt: skip

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


def in_turns(
    contestants: dict[str, Callable[[], float]], model: Any, budget: float
) -> dict[str, list[float]]:
    """Seconds of each step, by contestant, without those of the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    while True:
        round_began = time.perf_counter()
        for name, step in contestants.items():
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            value = step()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {value:.5f}, {seconds[name][-1]:.1f} s", flush=True)
        now = time.perf_counter()
        if now + (now - round_began) > began + budget:
            return {name: times[1:] or times for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("dpo", "grpo"))
    parser.add_argument("--seconds", type=float, default=240)
    args = parser.parse_args()
    yx.keep_freed_memory()
    model, tokenizer = yx.load("sample")
    contestants: dict[str, Callable[[], float]]
    if args.case == "dpo":
        rows = replies(PROMPT, [REPLY, REPLY], 0)
        reference = torch.tensor([-900.0, -901.0])
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
    seconds = in_turns(contestants, model, args.seconds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    forest = yx.Forest.of(rows)
    limit = forest.total / len(forest)
    record = {
        "case": args.case, "limit": limit, "seconds": seconds,
        "ratios": {name: value / median["forest"] for name, value in median.items()},
        "of_limit": median["unshared"] / median["forest"] / limit, "by_work": by_work(model, rows),
        "y_tokens_per_second": {name: len(yx.Targets.of(rows)) / value for name, value in median.items()},
        "threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    with RESULTS.open("a") as out:
        out.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
