"""The whole training step of the real model: transformers' own loss against the selective head.

    python benchmarks/head_step.py --out benchmarks/results/head_step.json

SmolLM2-135M-Instruct, float32, one sequence; forward + backward; medians of runs taken in turns. The head's share is
what is left after a step that stops at the hidden states. One layer's cost is the difference between the model and the
model without its last layer: it bounds what computing the last layer for the needed rows alone could bring.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ygivenx import load, selective_cross_entropy
from ygivenx.models.resolve import sample_model_path

Step = Callable[[], torch.Tensor]


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def run(model: torch.nn.Module, step: Step) -> float:
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    step().backward()
    return time.perf_counter() - start


def peak(model: torch.nn.Module, step: Step) -> int:
    model.zero_grad(set_to_none=True)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step().backward()
    return resident("VmHWM") - before


def steps_for(model: torch.nn.Module, ids: torch.Tensor, percent: int) -> dict[str, Step]:
    trained = max(1, (ids.shape[1] - 1) * percent // 100)
    rows = torch.arange(ids.shape[1] - 1)[-trained:]
    targets, weights = ids[0, rows + 1], torch.full((trained,), 1 / trained)
    labels = torch.full_like(ids, -100)
    labels[0, rows + 1] = targets
    layers = model.model.layers

    def body() -> torch.Tensor:
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
        return (hidden[rows] * 1e-3).sum()

    def without_last() -> torch.Tensor:
        model.model.layers, model.config.num_hidden_layers = layers[:-1], len(layers) - 1
        try:
            return body()
        finally:
            model.model.layers, model.config.num_hidden_layers = layers, len(layers)

    def ours() -> torch.Tensor:
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
        return selective_cross_entropy(hidden, model.lm_head.weight, rows, targets, weights)[1]

    return {
        "transformers": lambda: model(ids, labels=labels, use_cache=False).loss,
        "ours": ours,
        "body": body,
        "body without its last layer": without_last,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path, gguf_file = sample_model_path()
    model, _ = load(path, gguf_file=gguf_file)
    torch.manual_seed(0)
    ids = torch.randint(0, 49_152, (1, args.tokens))
    results = []
    for percent in (100, 20, 5):
        steps = steps_for(model, ids, percent)
        memory = {name: peak(model, step) for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.runs):
            for name, step in steps.items():
                times[name].append(run(model, step))
        seconds = {name: statistics.median(t) for name, t in times.items()}
        results.append({
            "tokens": args.tokens, "percent": percent, "runs": args.runs, "threads": torch.get_num_threads(),
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "peak_mb": {k: round(v / 2**20) for k, v in memory.items()},
            "head_share": {k: round(1 - seconds["body"] / seconds[k], 3) for k in ("transformers", "ours")},
            "last_layer_share": round(1 - seconds["body without its last layer"] / seconds["body"], 4),
        })  # fmt: skip
        print(json.dumps(results[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
