"""A hybrid model over a forest against per-turn samples, in training: forward + backward, on a CPU.

    python benchmarks/hybrid.py time qwen3_5 six_turns [--runs 5]        one line of benchmarks/results/hybrid.jsonl
    python benchmarks/hybrid.py memory qwen3_5 six_turns forest          peak memory of one step, alone in its process

Models have random weights, the widths of a layer of a real one, and its proportion of recurrent layers to attention.
Per-turn samples and the forest take turns in one process, and each round's ratio is kept. Seconds of the processor
leave out what other processes of the machine took; those of the clock are kept beside them. Cases, limit and
contestants are those of benchmarks/forest.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import forest as dense
import torch
import transformers

import ygivenx as yx

RESULTS = Path(__file__).parent / "results" / "hybrid.jsonl"
VOCAB = dense.VOCAB
# Half the width of Qwen3.5-0.8B, two of its periods: heads are as wide as there, and half as many.
QWEN = {
    "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "linear_num_key_heads": 8,
    "linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
# A period of Granite 4 H, of its micro model's width halved.
GRANITE = {
    "vocab_size": VOCAB, "hidden_size": 512, "num_hidden_layers": 10, "num_attention_heads": 8,
    "num_key_value_heads": 2, "shared_intermediate_size": 2048, "num_local_experts": 0, "mamba_n_heads": 16,
    "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2, "tie_word_embeddings": True,
    "layer_types": ["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 4,
}  # fmt: skip
# LFM2-350M at half its width.
LFM2 = {
    "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 2304, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    "layer_types": ["conv", "conv", "full_attention"] * 2 + ["conv", "conv"],
}  # fmt: skip
MODELS = {"qwen3_5": ("Qwen3_5Text", QWEN), "granite": ("GraniteMoeHybrid", GRANITE), "lfm2": ("Lfm2", LFM2)}


def build(name: str) -> Any:
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def seconds(contestant: str, model: Any, rows: list[Any]) -> tuple[float, float]:
    """(by the clock, of the processor)."""
    model.zero_grad()
    started = time.perf_counter(), time.process_time()
    dense.CONTESTANTS[contestant](model, rows)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measured(args: argparse.Namespace) -> dict[str, Any]:
    name, case = args.rest
    model, rows = build(name), dense.CASES[case]()
    made = yx.Forest.of(rows)
    for contestant in ("per_turn", "forest"):  # warms up
        seconds(contestant, model, rows)
    rounds = [(seconds("per_turn", model, rows), seconds("forest", model, rows)) for _ in range(args.runs)]
    limit = made.total / len(made)
    clock, processor = ([apart[i] / shared[i] / limit for apart, shared in rounds] for i in range(2))
    return {
        "samples": len(rows), "tokens": made.total, "distinct": len(made), "limit": limit,
        "of_the_limit": statistics.median(processor), "of_the_limit_by_the_clock": statistics.median(clock),
        "lowest_and_highest": [min(processor), max(processor)], "by_the_clock": [min(clock), max(clock)],
        "rounds": rounds, "load": os.getloadavg()[0],
    }  # fmt: skip


def memory(args: argparse.Namespace) -> dict[str, Any]:
    name, case, contestant = args.rest
    model, rows = build(name), dense.CASES[case]()
    dense.forget_peak()
    before = dense.peak()
    dense.CONTESTANTS[contestant](model, rows)
    return {"contestant": contestant, "before": before, "peak": dense.peak()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("rest", nargs="+", metavar="model case [contestant]")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    yx.keep_freed_memory()
    found = {"time": measured, "memory": memory}[args.what](args)
    record = {
        "what": args.what, "command": "python " + " ".join(sys.argv), "model": args.rest[0], "case": args.rest[1],
        "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(), **found,
    }  # fmt: skip
    with args.out.open("a") as out:
        print(json.dumps(record), file=out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
