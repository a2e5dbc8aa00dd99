"""The seed's question, measured: loss on [question, answer] or on the answer alone, same rows, same steps.

    python benchmarks/seed_question.py run --seed 0 --train all        # one run, appended to the results
    python benchmarks/seed_question.py page                            # docs/seed-question.md from the results

A run fine-tunes SmolLM2-135M-Instruct on sums in words. Before and after: nats per token of y given x
(conditional) and of x (marginal) on held-out sums, greedy generation against the right answer, and the same nats on
held-out GSM8K rows, which nobody trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ygivenx as yx
from ygivenx.models.resolve import sample_model_path
from ygivenx.scores.node_log_probs import node_log_probs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "seed-question.json"
PAGE = ROOT / "benchmarks" / "seed-question.md"
ASKED = (
    "What is {a}+{b}?",
    "How much is {a} plus {b}?",
    "Please add {a} and {b}.",
    "Tell me the sum of {a} and {b}.",
)
STEPS, ROWS, RATE, HELD_OUT = 32, 8, 3e-5, 64


def sums(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Questions and answers, each pair of numbers once."""
    pairs = rng.permutation(90 * 90)[:count]
    rows = []
    for pair in pairs.tolist():
        a, b = 10 + pair // 90, 10 + pair % 90
        question = ASKED[int(rng.integers(len(ASKED)))].format(a=a, b=b)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": str(a + b)},
                ]
            }
        )
    return rows


def gsm8k(count: int) -> list[dict[str, Any]]:
    path = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    short = [r for r in rows if len(r["question"]) + len(r["answer"]) < 330][:count]
    return [
        {
            "messages": [
                {"role": "user", "content": r["question"]},
                {"role": "assistant", "content": r["answer"]},
            ]
        }
        for r in short
    ]


def nats(model: Any, examples: list[Any]) -> dict[str, float]:
    """Mean −log p per token: of y given x, of x, and of the user's words alone, without system and template."""
    sequences = [s for e in examples for s in e.sequences]
    forest = yx.Forest.of(sequences)
    log_p = node_log_probs(model, forest)
    values = -np.concatenate([log_p[path] for path in forest.paths])
    y = np.concatenate([s.weights > 0 for s in sequences])
    kinds = np.array([g.kind for s in sequences for g in s.segments for _ in range(g.start, g.stop)])
    masks = {"conditional": y, "marginal": ~y, "question": kinds == "user"}
    return {name: float(np.nanmean(values[mask])) for name, mask in masks.items()}


@torch.no_grad()
def generations(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Greedy answers: the share that is exactly right, and the share that ends by itself within 12 tokens."""
    prompts = [
        tokenizer.apply_chat_template(r["messages"][:1], add_generation_prompt=True, tokenize=False)
        for r in rows
    ]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    ended = (out == tokenizer.eos_token_id).any(1).float().mean().item()
    said = [t.strip() for t in tokenizer.batch_decode(out, skip_special_tokens=True)]
    right = [s == r["messages"][1]["content"] for s, r in zip(said, rows, strict=True)]
    return {"exact_match": float(np.mean(right)), "ended": ended}


def measure(
    model: Any, tokenizer: Any, held_out: list[dict[str, Any]], other: list[dict[str, Any]]
) -> dict[str, Any]:
    model.eval()
    encoder = yx.Encoder(tokenizer)
    return {
        "sums": nats(model, [encoder(r) for r in held_out]) | generations(model, tokenizer, held_out),
        "gsm8k": nats(model, [encoder(r) for r in other]),
    }


def run(seed: int, train: str) -> dict[str, Any]:
    """One fine-tuning run, measured before and after."""
    path, gguf_file = sample_model_path()
    model, tokenizer = yx.load(path, gguf_file=gguf_file)
    rng = np.random.default_rng(seed)
    rows = sums(rng, STEPS * ROWS + HELD_OUT)
    held_out, rows, other = rows[:HELD_OUT], rows[HELD_OUT:], gsm8k(12)
    encoder = yx.Encoder(tokenizer, train=train)
    before = measure(model, tokenizer, held_out, other)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    start, trained = time.perf_counter(), 0
    model.train()
    for step in range(STEPS):
        forest = yx.Forest.of(encoder(r) for r in rows[step * ROWS : (step + 1) * ROWS])
        trained += int((forest.weight > 0).sum())
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        yx.loss(model, forest).value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    after = measure(model, tokenizer, held_out, other)
    return {"seed": seed, "train": train, "before": before, "after": after, "seconds": round(seconds, 1)}


def append(result: dict[str, Any]) -> None:
    told = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    told["command"] = "python benchmarks/seed_question.py run --seed S --train all|assistant"
    told["setting"] = {"steps": STEPS, "rows_per_step": ROWS, "rate": RATE, "held_out": HELD_OUT,
                       "torch": torch.__version__, "threads": torch.get_num_threads()}  # fmt: skip
    same = lambda r: (r["seed"], r["train"]) == (result["seed"], result["train"])  # noqa: E731
    told["runs"] = [r for r in told["runs"] if not same(r)] + [result]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(told, indent=1))


def spread(values: list[float]) -> str:
    """mean ± standard deviation over seeds; the value alone where there is one."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


QUANTITIES = (
    ("held-out sums: conditional, nats per token of y", ("sums", "conditional")),
    ("held-out sums: marginal, nats per token of x", ("sums", "marginal")),
    ("held-out sums: the question's words alone, nats per token", ("sums", "question")),
    ("held-out sums: greedy answers exactly right", ("sums", "exact_match")),
    ("held-out sums: answers that end by themselves", ("sums", "ended")),
    ("GSM8K, untrained: conditional, nats per token of y", ("gsm8k", "conditional")),
    ("GSM8K, untrained: marginal, nats per token of x", ("gsm8k", "marginal")),
    ("GSM8K, untrained: the question's words alone, nats per token", ("gsm8k", "question")),
)


def page() -> str:
    told = json.loads(RESULTS.read_text())
    runs, setting = told["runs"], told["setting"]
    seeds = [{r["seed"] for r in runs if r["train"] == t} for t in ("all", "assistant")]
    both = seeds[0] & seeds[1]
    of = {t: [r for r in runs if r["train"] == t and r["seed"] in both] for t in ("all", "assistant")}
    lines = [
        "# Should x be trained?",
        "",
        "The question behind this project: fine-tune on [question, answer] with the loss on every token, or on the "
        "answer alone? Same rows, same steps, same learning rate; only the weights of x differ (1 or 0).",
        "",
        f"SmolLM2-135M-Instruct, {setting['steps']} steps of {setting['rows_per_step']} sums in words, AdamW at "
        f"{setting['rate']:g}, seeds {sorted(both)} (other sums for each), mean ± standard deviation over seeds.",
        "",
        "| | before | loss on all tokens | loss on y alone |",
        "|---|---|---|---|",
    ]
    for name, (data, key) in QUANTITIES:
        before = spread([r["before"][data][key] for r in of["assistant"]])
        after = [spread([r["after"][data][key] for r in of[t]]) for t in ("all", "assistant")]
        lines.append(f"| {name} | {before} | {after[0]} | {after[1]} |")
    lines += [
        "",
        reading(of),
        "",
        f"`{told['command']}`, results in `benchmarks/results/seed-question.json`.",
        "",
    ]
    return "\n".join(lines)


def reading(of: dict[str, list[dict[str, Any]]]) -> str:
    """What the table says, with its own numbers."""

    def mean(train: str, key: str, when: str = "after") -> float:
        return statistics.mean(r[when]["sums"][key] for r in of[train])

    gained = {t: {k: mean(t, k, "before") - mean(t, k) for k in ("conditional", "marginal")} for t in of}
    share = {t: g["marginal"] / g["conditional"] for t, g in gained.items()}
    return (
        f"For the same steps, loss on y alone answers {mean('assistant', 'exact_match'):.0%} of the held-out sums, "
        f"loss on all tokens {mean('all', 'exact_match'):.0%}; y costs {mean('assistant', 'conditional'):.3f} "
        f"against {mean('all', 'conditional'):.3f} nats per token. With the loss on all tokens x improves "
        f"{share['all']:.2f} times as much as y (in nats per token), with the loss on y {share['assistant']:.2f} "
        "times: that gap is what the callback `yx.Watch` warns by."
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--seed", type=int, required=True)
    runner.add_argument("--train", choices=("all", "assistant"), required=True)
    commands.add_parser("page")
    asked = parser.parse_args(arguments)
    if asked.command == "page":
        PAGE.write_text(page())
        return
    result = run(asked.seed, asked.train)
    append(result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
