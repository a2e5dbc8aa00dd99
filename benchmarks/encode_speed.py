"""One pass over ten thousand chats against bare `apply_chat_template(tokenize=True)`: the first rows included.

python benchmarks/encode_speed.py --tokenizer DIR [--data DIR] [--rounds 3] > results/encode_speed.json

Each side is a process of its own, made anew for each round, with one thread. Loading libraries, the tokenizer and the
rows comes before the clock; making the `Encoder` comes after it. Bare is one rendering and its ids for each row, no
mask. Exits with 1 where the processor time of one pass is more than LIMIT times bare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 1.2
DATA = Path(__file__).parents[1] / "../shared/data"
SETS = (
    "gsm8k/train.jsonl",
    "fastchat/dummy_conversation.json",
    "llamafactory/alpaca_en_demo.json",
    "llamafactory/alpaca_zh_demo.json",
    "llamafactory/identity.json",
    "llamafactory/v1_sft_demo.jsonl",
    "llamafactory/glaive_toolcall_en_demo.json",
    "llamafactory/reason_tool_use_demo_50.jsonl",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--side", choices=("ygivenx", "bare"), help="one side, in this process")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args)))
    else:
        compare(args)


def one_side(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one pass: of the processor, and by the clock."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    from ygivenx import Encoder, Rejected
    from ygivenx.rows.data import read

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows = [r.value for s in args.sets for r in read(args.data / s) if not isinstance(r, Rejected)]
    chats = [([{k: v for k, v in m.items() if k != "weight"} for m in r.messages], r.tools) for r in rows]
    clock, processor = time.perf_counter(), time.process_time()
    if args.side == "bare":
        ids = [tokenizer.apply_chat_template(m, tools=t)["input_ids"] for m, t in chats]
        counts = {"accepted": len(ids), "tokens": sum(map(len, ids))}
    else:
        examples, rejected = Encoder(tokenizer).batch(rows)
        counts = {"accepted": len(examples), "quarantined": len(rejected)}
    seconds = {"processor": time.process_time() - processor, "clock": time.perf_counter() - clock}
    if args.side == "ygivenx":
        counts["tokens"] = sum(len(s) for e in examples for s in e.sequences)
    return {"rows": len(rows), **counts, **seconds}


def compare(args: argparse.Namespace) -> None:
    rounds: dict[str, list[dict[str, Any]]] = {"ygivenx": [], "bare": []}
    options = ["--tokenizer", args.tokenizer, "--data", str(args.data), "--sets", *args.sets]
    for _ in range(args.rounds):
        for side, results in rounds.items():
            command = [sys.executable, __file__, "--side", side, *options]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    median = {
        side: {name: statistics.median(r[name] for r in results) for name in ("processor", "clock")}
        for side, results in rounds.items()
    }
    times = {
        name: round(median["ygivenx"][name] / median["bare"][name], 3) for name in ("processor", "clock")
    }
    result = {"times_bare": times, "limit": LIMIT, **{side: results[0] for side, results in rounds.items()}}
    print(json.dumps(result | {"seconds": median, "rounds": args.rounds}))
    sys.exit(times["processor"] > LIMIT)


if __name__ == "__main__":
    main()
