"""The forest against per-turn samples and padded batches, in training: forward + backward on the real model.

    python benchmarks/forest.py case six_turns [--runs 3]     one line of benchmarks/results/forest.jsonl per case
    python benchmarks/forest.py memory six_turns forest       peak memory of one step, alone in its process
    python benchmarks/forest.py precise twenty_turns          gradients against those in float64
    python benchmarks/forest.py growth 4096                   seconds and peak memory of a step on n distinct tokens
    python benchmarks/forest.py build                         building a forest of a million tokens
    python benchmarks/forest.py table                         the tables of benchmarks/README.md

Shapes are those of the named cases, token ids are random: neither changes the time of a step. All contestants of
a case run in one process, in turns: a round that warms up, then --runs of which the medians are kept (of those of
--once a single one). "per turn" runs each sample by itself, through the same code (plain causal attention, the head
on selected rows only); "padded" is what a trainer does by default: padded batches, all logits, labels of −100. The
limit is tokens of all samples / distinct tokens. The limit by work counts multiplications instead: distinct tokens
stand further back on average than the repeated ones, so each of them attends to more. Freed memory is kept for all
contestants, as `ygx` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import random_model

import ygivenx as yx
from ygivenx.models.resolve import sample_model_path
from ygivenx.sequence import Sequence

RESULTS = Path(__file__).parent / "results" / "forest.jsonl"
RNG = np.random.default_rng(0)
VOCAB = 49_152
CHUNK = 2048  # distinct tokens of which "streamed" keeps activations


def tokens(n: int) -> np.ndarray:
    return RNG.integers(100, VOCAB, n)


def sample(x: np.ndarray, y: np.ndarray) -> Sequence:
    return Sequence(np.concatenate((x, y)), np.concatenate((np.zeros(len(x)), np.ones(len(y)))))


def turns(
    count: int, user: int, reasoning: int, answer: int, start: int = 0, after: int = 0
) -> list[Sequence]:
    """Every turn trained with its reasoning, which the template drops from history; `after` follows each turn."""
    history, rows = tokens(start), []
    for _ in range(count):
        history = np.concatenate((history, tokens(user)))
        said = tokens(answer)
        rows.append(sample(history, np.concatenate((tokens(reasoning), said))))
        history = np.concatenate((history, said, tokens(after)))
    return rows


def completions(prompt: int, count: int, length: int) -> list[Sequence]:
    x = tokens(prompt)
    return [sample(x, tokens(length)) for _ in range(count)]


def loop(count: int, start: int, call: int, result: int) -> list[Sequence]:
    """One tool turn after another, each rendered in history as it was trained."""
    history, rows = tokens(start), []
    for _ in range(count):
        rows.append(sample(history, tokens(call)))
        history = np.concatenate((rows[-1].ids, tokens(result)))
    return rows


CASES: dict[str, Callable[[], list[Sequence]]] = {
    "six_turns": lambda: turns(6, user=70, reasoning=95, answer=100),
    "one_prompt_eight_completions": lambda: completions(400, 8, 77),
    "pair": lambda: completions(400, 2, 150),
    "twenty_turns": lambda: turns(20, user=36, reasoning=80, answer=62),
    "agent": lambda: loop(12, start=860, call=75, result=180),
    "agent_stripped": lambda: turns(12, user=0, reasoning=20, answer=45, start=860, after=200),
    "agent_qwen3": lambda: turns(12, user=0, reasoning=4, answer=36, start=2270, after=100),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["case", "memory", "precise", "growth", "build", "table"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--chunks", nargs="*", type=int, default=[], help="further sizes, as streamed_SIZE")
    parser.add_argument("--once", nargs="*", default=["padded", "dense"])
    parser.add_argument("--random", action="store_true", help="the model's shape with random weights")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.what == "table":
        print(table(args.out))
        return
    yx.keep_freed_memory()
    kinds = {"case": case, "memory": memory, "precise": precise, "growth": growth, "build": build}
    record = kinds[args.what](args)
    told = {
        "what": args.what,
        "command": "python " + " ".join(sys.argv),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **record,
    }
    with args.out.open("a") as out:
        print(json.dumps(told), file=out)
    print(json.dumps(told))


def load(args: argparse.Namespace) -> Any:
    if args.random:
        return random_model("SmolLM2-135M")
    path, gguf_file = sample_model_path()
    return yx.load(path, gguf_file=gguf_file)[0]


# -- contestants: each makes all gradients of the case ---------------------------------------------------


def forest(model: Any, rows: list[Sequence], **options: Any) -> float:
    out = yx.loss(model, rows, **options)
    out.value.backward()
    return out.value.item()


def streamed(model: Any, rows: list[Sequence]) -> float:
    return forest(model, rows, chunk=CHUNK)


def dense(model: Any, rows: list[Sequence]) -> float:
    return forest(model, rows, route="dense")


def per_turn(model: Any, rows: list[Sequence]) -> float:
    weight = float(sum(r.weights.sum() for r in rows))
    return sum(forest(model, [r], denominator=weight) for r in rows)


def padded(model: Any, rows: list[Sequence]) -> float:
    """Batches of at most four samples, so that all logits fit into memory."""
    weight = float(sum(r.weights.sum() for r in rows))
    total = 0.0
    for i in range(0, len(rows), 4):
        part = rows[i : i + 4]
        shape = len(part), max(map(len, part))
        ids, labels, mask = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100), torch.zeros(shape)
        for j, r in enumerate(part):
            ids[j, : len(r)], labels[j, : len(r)] = torch.from_numpy(r.ids.copy()), torch.from_numpy(r.labels)
            mask[j, : len(r)] = 1
        given = dict(zip(("input_ids", "labels", "attention_mask"), (ids, labels, mask), strict=True))
        given = {name: t.to(model.device) for name, t in given.items()}
        loss = model(**given, num_items_in_batch=weight, use_cache=False).loss
        loss.backward()
        total += loss.item()
    return total


def one_rendering(model: Any, rows: list[Sequence]) -> float:
    """The longest sample with as many trained tokens as all of them: one plain rendering, were one mask right."""
    longest = max(rows, key=len)
    trained = sum(int(r.weights.sum()) for r in rows)
    weights = np.zeros(len(longest))
    weights[np.linspace(1, len(longest) - 1, min(trained, len(longest) - 1)).astype(int)] = 1
    return forest(model, [Sequence(longest.ids, weights)])


CONTESTANTS = {f.__name__: f for f in (forest, streamed, dense, per_turn, padded, one_rendering)}


def contestant(name: str) -> Callable[..., float]:
    """One of the above, or streamed_N in chunks of N."""
    return CONTESTANTS.get(name) or partial(forest, chunk=int(name.removeprefix("streamed_")))


def case(args: argparse.Namespace) -> dict[str, Any]:
    (name,) = args.rest
    rows, model = CASES[name](), load(args)
    names = [n for n in CONTESTANTS if n not in args.without] + [f"streamed_{n}" for n in args.chunks]
    running = {n: contestant(n) for n in names}
    seconds: dict[str, list[float]] = {n: [] for n in running}
    told: dict[str, Any] = {}
    wanted: dict[str, torch.Tensor] = {}
    for run in range(args.runs + 1):  # the first one warms up
        for n, f in sorted(running.items(), key=lambda item: item[0] != "per_turn"):
            if run > 1 and n in args.once:
                continue
            model.zero_grad()
            started = time.perf_counter()
            loss = f(model, rows)
            if run:
                seconds[n].append(time.perf_counter() - started)
            if run == 0 and n == "per_turn":
                wanted = {k: p.grad.clone() for k, p in model.named_parameters()}
            if run == 0 and wanted and n.startswith(("forest", "streamed", "dense")):
                told[f"{n}_gradient_error"] = max(
                    float((p.grad - wanted[k]).norm() / wanted[k].norm()) for k, p in model.named_parameters()
                )
            told.setdefault("loss", {})[n] = loss
    made = yx.Forest.of(rows)
    return {
        "case": name,
        "samples": len(rows),
        "tokens": made.total,
        "distinct": len(made),
        "limit": made.total / len(made),
        "limit_by_work": sum(work(model, yx.Forest.of([r])) for r in rows) / work(model, made),
        "seconds": {n: statistics.median(s) for n, s in seconds.items()},
        "all_seconds": seconds,
        **told,
    }


def work(model: Any, forest: yx.Forest) -> float:
    """Multiplications of a step, forward and backward (3 × forward): weights, attention, head of needed rows."""
    c = model.config
    body = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n
    )
    attended = (
        2
        * c.num_attention_heads
        * c.head_dim
        * c.num_hidden_layers
        * float((forest.depth[forest.fed] + 1).sum())
    )
    head = c.hidden_size * c.vocab_size * len(np.unique(forest.edges().rows))
    return 3 * (body * len(forest.fed) + attended + head)


def precise(args: argparse.Namespace) -> dict[str, Any]:
    """The largest relative L2 difference of a tensor's gradient to the one in float64, by contestant."""
    (name,) = args.rest
    rows, model = CASES[name](), load(args)
    made = {n: gradients(CONTESTANTS[n], model, rows) for n in ("forest", "streamed", "per_turn")}
    exact = gradients(streamed, model.double(), rows)
    return {
        "case": name,
        "to_float64": {n: max(differences(ours, exact)) for n, ours in made.items()},
        "forest_to_per_turn": max(differences(made["forest"], made["per_turn"])),
    }


def gradients(run: Callable[..., float], model: Any, rows: list[Sequence]) -> list[torch.Tensor]:
    model.zero_grad()
    run(model, rows)
    return [p.grad.clone() for p in model.parameters()]


def differences(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


# -- memory and growth -----------------------------------------------------------------------------------


def peak() -> int:
    """The highest resident set so far, in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory(args: argparse.Namespace) -> dict[str, Any]:
    name, who = args.rest
    model, rows = load(args), CASES[name]()
    forget_peak()
    before = peak()
    contestant(who)(model, rows)
    return {"case": name, "contestant": who, "before": before, "peak": peak()}


def small() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=65_536, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """One trajectory of n distinct tokens, a quarter of them trained, whole and in chunks of 1024; a small model."""
    n, way = int(args.rest[0]), args.rest[1]
    model = small()
    rows = loop(max(1, n // 512), start=256, call=128, result=384)
    forget_peak()
    before, started = peak(), time.perf_counter()
    forest(model, rows, chunk=1024 if way == "streamed" else 1 << 30)
    seconds = time.perf_counter() - started
    return {
        "distinct": len(yx.Forest.of(rows)),
        "way": way,
        "seconds": seconds,
        "before": before,
        "peak": peak(),
    }


def build(args: argparse.Namespace) -> dict[str, Any]:
    rows = [r for _ in range(1000) for r in completions(100, 9, 100)]
    seconds = []
    for _ in range(args.runs):
        started = time.perf_counter()
        made = yx.Forest.of(rows)
        seconds.append(time.perf_counter() - started)
    return {"distinct": len(made), "tokens": made.total, "seconds": statistics.median(seconds)}


# -- tables ----------------------------------------------------------------------------------------------


def table(results: Path) -> str:
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    latest = {
        (r["what"], r.get("case"), r.get("contestant"), r.get("way"), r.get("distinct")): r for r in lines
    }
    kinds = {k: [r for r in latest.values() if r["what"] == k] for k in ("case", "memory", "growth", "build")}
    parts = [_cases(kinds["case"]), _memory(kinds["memory"]), _growth(kinds["growth"])]
    parts += [
        f"A forest of {r['distinct']:,} distinct tokens ({r['tokens']:,} in all) is built in {r['seconds']:.2f} s."
        for r in kinds["build"]
    ]
    return "\n\n".join(parts)


def _cases(records: list[dict[str, Any]]) -> str:
    rows = [
        "| case | samples | tokens | distinct | limit | by work | forest | share of the limit | of that by work "
        "| streamed, of the limit | dense mask, of the limit | padded, all logits | forest / one rendering "
        "| gradient error |",
        "|" + "---|" * 14,
    ]
    for r in records:
        error, one = r.get("forest_gradient_error"), r["seconds"].get("one_rendering")
        cells = [
            r["case"].replace("_", " "), r["samples"], f"{r['tokens']:,}", f"{r['distinct']:,}", f"{r['limit']:.2f}×",
            f"{r['limit_by_work']:.2f}×", _times(r, "forest"), _share(r, "forest"),
            _share(r, "forest", "limit_by_work"), _share(r, "streamed"), _share(r, "dense"), _times(r, "padded"),
            f"{r['seconds']['forest'] / one:.2f}" if one else "–", f"{error:.1e}" if error else "–",
        ]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _times(record: dict[str, Any], name: str) -> str:
    """How many times as fast as per-turn samples."""
    s = record["seconds"]
    return f"{s['per_turn'] / s[name]:.2f}×" if {"per_turn", name} <= s.keys() else "–"


def _share(record: dict[str, Any], name: str, limit: str = "limit") -> str:
    s = record["seconds"]
    return f"{s['per_turn'] / s[name] / record[limit]:.0%}" if {"per_turn", name} <= s.keys() else "–"


def _memory(records: list[dict[str, Any]]) -> str:
    rows = ["| case | contestant | peak memory of a step, beyond the model |", "|---|---|---|"]
    for r in records:
        names = f"{r['case']} | {r['contestant']}".replace("_", " ")
        rows.append(f"| {names} | {(r['peak'] - r['before']) / 2**30:.2f} GB |")
    return "\n".join(rows)


def _growth(records: list[dict[str, Any]]) -> str:
    rows = ["| distinct tokens | way | seconds | peak memory beyond the model | |", "|---|---|---|---|---|"]
    for r in sorted(records, key=lambda r: (r["way"], r["distinct"])):
        used = (r["peak"] - r["before"]) / 2**30
        rows.append(
            f"| {r['distinct']:,} | {r['way']} | {r['seconds']:.1f} | {used:.2f} GB | {'█' * round(used * 4)} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
