"""The forest on a CUDA device, in training: forward + backward, against what else could be done with the same samples.

    python benchmarks/gpu.py case twenty_turns Llama-3.2-1B bfloat16 [--runs 5] [--times 4]
    python benchmarks/gpu.py head 128256 2048 bfloat16           the head alone, against torch's on all logits
    python benchmarks/gpu.py table

One line of benchmarks/results/gpu.jsonl per call. Shapes of cases are those of forest.py, `--times` of them in one
step; shapes of models are in shapes.py, with random weights. Contestants, in turns, the medians of --runs rounds after
one that warms up:

    forest     ours: every distinct prefix once, FlexAttention
    streamed   the same in chunks of 2,048 tokens
    dense      the same with one masked product per layer
    packed     no padding, nothing shared: all samples in one variable-length attention, the head on selected rows
    per_turn   each sample by itself, through the same code
    padded     batches of four samples, all logits, as trainers do by default

The limit is tokens of all samples / distinct tokens. The error of gradients is to those of "per_turn", relative L2,
the worst tensor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forest import CASES, dense, differences, forest, padded, per_turn, streamed, work
from shapes import random_model

import ygivenx as yx
from ygivenx.head.selective import selective_cross_entropy
from ygivenx.sequence import Sequence

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["case", "head", "table"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.what == "table":
        print(table(args.out))
        return
    record = {"case": case, "head": head}[args.what](args)
    told = {
        "what": args.what,
        "command": "python " + " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **record,
    }
    with args.out.open("a") as out:
        print(json.dumps(told), file=out)
    print(json.dumps(told))


# -- contestants -----------------------------------------------------------------------------------------


def apart(rows: list[Sequence]) -> list[Sequence]:
    """The same lengths and weights, but each sample begins with a token of its own."""
    made = []
    for i, r in enumerate(rows):
        ids = r.ids.copy()
        ids[0] = i
        made.append(Sequence(ids, r.weights))
    return made


def packed(model: Any, rows: list[Sequence]) -> float:
    return forest(model, apart(rows))


CONTESTANTS: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (per_turn, forest, streamed, dense, packed, padded)
}


def measured(run: Callable[[], Any], runs: int) -> dict[str, Any]:
    """Seconds of each of `runs`, and bytes beyond what was there, of the last one."""
    seconds = []
    for _ in range(runs):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"all_seconds": seconds, "bytes": torch.cuda.max_memory_allocated() - before}


def case(args: argparse.Namespace) -> dict[str, Any]:
    name, shape, dtype = args.rest
    rows = [r for _ in range(args.times) for r in CASES[name]()]
    model = random_model(shape, getattr(torch, dtype), "cuda")
    running = {n: f for n, f in CONTESTANTS.items() if n not in args.without}
    told: dict[str, dict[str, Any]] = {n: {"all_seconds": []} for n in running}
    wanted: list[torch.Tensor] = []
    for round_ in range(1 + args.runs):  # the first one warms up
        for n, f in running.items():
            model.zero_grad()
            try:
                once = measured(lambda f=f: f(model, rows), 1)
            except torch.OutOfMemoryError:
                told[n]["out_of_memory"] = True
                continue
            if round_:
                told[n]["all_seconds"] += once["all_seconds"]
                told[n]["bytes"] = once["bytes"]
                continue
            told[n]["first"] = once["all_seconds"][0]
            if n == "per_turn":
                wanted = [p.grad.clone() for p in model.parameters()]
            elif wanted and n in ("forest", "streamed", "dense"):
                told[n]["gradient_error"] = max(differences([p.grad for p in model.parameters()], wanted))
        wanted = []
    for t in told.values():
        t["seconds"] = statistics.median(t["all_seconds"]) if t["all_seconds"] else None
    made = yx.Forest.of(rows)
    return {
        "case": name, "times": args.times, "shape": shape, "dtype": dtype, "samples": len(rows),
        "tokens": made.total, "distinct": len(made), "limit": made.total / len(made),
        "limit_by_work": sum(work(model, yx.Forest.of([r])) for r in rows) / work(model, made),
        "contestants": told,
    }  # fmt: skip


def head(args: argparse.Namespace) -> dict[str, Any]:
    """4,096 rows, each with a target: loss and both gradients."""
    vocabulary, width, dtype = int(args.rest[0]), int(args.rest[1]), getattr(torch, args.rest[2])
    torch.manual_seed(0)
    hidden = torch.randn(4096, width, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device="cuda") / width**0.5).to(dtype).requires_grad_()
    rows, targets = torch.arange(4096, device="cuda"), torch.randint(0, vocabulary, (4096,), device="cuda")
    weights = torch.full((4096,), 1 / 4096, device="cuda")

    def ours() -> None:
        _, loss = selective_cross_entropy(hidden, weight, rows, targets, weights)
        torch.autograd.grad(loss, (hidden, weight))

    def all_logits() -> None:
        logits = (hidden @ weight.T).float()
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), (hidden, weight))

    told = {}
    for f in (ours, all_logits):
        measured(f, 1)
        told[f.__name__] = measured(f, args.runs)
        told[f.__name__]["seconds"] = statistics.median(told[f.__name__]["all_seconds"])
    return {"vocabulary": vocabulary, "width": width, "dtype": args.rest[2], "contestants": told}


def table(results: Path) -> str:
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return f"{_cases(lines)}\n\n{_heads(lines)}"


def _heads(lines: list[dict[str, Any]]) -> str:
    latest = {(r["vocabulary"], r["width"], r["dtype"]): r for r in lines if r["what"] == "head"}
    rows = ["| vocabulary, H, precision | ours, ms (GB) | all logits, ms (GB) |", "|---|---|---|"]
    for (vocabulary, width, dtype), r in latest.items():
        cells = [f"{vocabulary:,}, {width:,}, {dtype}", *map(_cell, r["contestants"].values())]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _cases(lines: list[dict[str, Any]]) -> str:
    latest = {(r["case"], r["times"], r["shape"], r["dtype"]): r for r in lines if r["what"] == "case"}
    names = list(CONTESTANTS)
    rows = [
        "| model | precision | case | distinct of tokens | limit | by work | "
        + " | ".join(f"{n}, ms (GB)" for n in names)
        + " | of the limit, over packed | over per turn | gradient error |",
        "|" + "---|" * (9 + len(names)),
    ]
    for r in latest.values():
        c = r["contestants"]
        cells = [
            r["shape"], r["dtype"], f"{r['case'].replace('_', ' ')} × {r['times']}",
            f"{r['distinct']:,} of {r['tokens']:,}", f"{r['limit']:.2f}×", f"{r['limit_by_work']:.2f}×",
            *(_cell(c.get(n)) for n in names), _share(r, "packed"), _share(r, "per_turn"),
            f"{c['forest']['gradient_error']:.1e}" if "gradient_error" in c["forest"] else "–",
        ]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _cell(told: dict[str, Any] | None) -> str:
    if not told or not told["seconds"]:
        return "out of memory" if told and told.get("out_of_memory") else "–"
    return f"{1000 * told['seconds']:.0f} ({told['bytes'] / 2**30:.1f})"


def _share(record: dict[str, Any], peer: str) -> str:
    c = record["contestants"]
    if not c.get(peer, {}).get("seconds"):
        return "–"
    return f"{c[peer]['seconds'] / c['forest']['seconds'] / record['limit']:.0%}"


if __name__ == "__main__":
    main()
