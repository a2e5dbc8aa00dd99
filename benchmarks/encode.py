"""Masks against bare `apply_chat_template(tokenize=True)` and TRL's preparation: same rows, one run, medians.

python benchmarks/encode.py --tokenizer DIR --data FILE [--rows 200] [--join N] [--trl NAME] >> results/encode.jsonl

A warm encoder: one round goes before the measured ones. `first_round` is the cold one, which learns the rows' shapes.
Bare: one rendering and its ids for each row, no mask. Where a template rewrites history, a row gives several
sequences, so that tokens out per second are told too. `--join` makes conversations of N rows each, whose texts don't
repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from transformers import AutoTokenizer

from ygivenx import Encoder, Forest, Rejected
from ygivenx.rows.data import read


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--join", type=int, default=1, metavar="N", help="N rows make one conversation")
    parser.add_argument(
        "--trl", metavar="NAME", help="use TRL's template of this name, and time its training twin too"
    )
    args = parser.parse_args()
    options = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, **options)
    if args.trl:
        tokenizer.chat_template = template(args.trl)
    read_rows = (r.value for r in read(args.data) if not isinstance(r, Rejected))
    rows = joined(list(islice(read_rows, args.rows * args.join)), args.join)
    encoder = Encoder(tokenizer, dropped="warn")
    chats = [([{k: v for k, v in m.items() if k != "weight"} for m in r.messages], r.tools) for r in rows]
    ways: dict[str, Callable[[], Any]] = {
        "ygivenx": lambda: encoder.batch(rows),
        "apply_chat_template": lambda: [tokenizer.apply_chat_template(m, tools=t) for m, t in chats],
    }
    if args.trl:
        ways["trl"] = lambda: trl_masks(tokenizer, chats, template(f"{args.trl}_training"))
    seconds = measured(ways, args.repeats)
    bare_tokens = sum(len(ids["input_ids"]) for ids in ways["apply_chat_template"]())
    report(args, encoder, rows, seconds, bare_tokens)


def joined(rows: list[Any], size: int) -> list[Any]:
    """Conversations of `size` rows each; the system prompt and tools are the first one's."""
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [replace(g[0], messages=sum((r.messages for r in g), ())) for g in groups]


def template(name: str) -> str:
    origin = find_spec("trl").origin  # type: ignore[union-attr]
    return (Path(str(origin)).parent / "chat_templates" / f"{name}.jinja").read_text()


def trl_masks(tokenizer: Any, chats: list[Any], training: str) -> list[Any]:
    """The call that SFTTrainer makes for each row with assistant_only_loss."""
    options = {"chat_template": training, "return_dict": True, "return_assistant_tokens_mask": True}
    return [tokenizer.apply_chat_template(m, tools=t, **options) for m, t in chats]


def measured(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each round, the ways taken in turns so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first round warms up
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def report(
    args: argparse.Namespace,
    encoder: Encoder,
    rows: list[Any],
    seconds: dict[str, list[float]],
    bare_tokens: int,
) -> None:
    examples, rejected = encoder.batch(rows)
    sequences = [s for e in examples for s in e.sequences]
    split = [e for e in examples if len(e.sequences) > 1]
    shared = [s for e in split for s in e.sequences]
    first = {name: s[0] for name, s in seconds.items()}
    seconds = {name: s[1:] for name, s in seconds.items()}
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    print(
        json.dumps(
            {
                "command": " ".join(
                    ["benchmarks/encode.py", *(a.rpartition("shared/data/")[2] for a in sys.argv[1:])]
                ),
                "rows": len(rows),
                "accepted": len(examples),
                "quarantined": len(rejected),
                "split_share": round(len(split) / max(1, len(examples)), 4),
                "sharing": round(sum(map(len, shared)) / len(Forest.of(shared).token), 3) if shared else 1.0,
                "tokens": {"ygivenx": sum(map(len, sequences)), "apply_chat_template": bare_tokens},
                "ms_per_row": {k: round(1000 * v / len(rows), 4) for k, v in medians.items()},
                "spread": {k: round(max(v) / min(v), 3) for k, v in seconds.items()},
                "first_round": {k: round(1000 * v / len(rows), 4) for k, v in first.items()},
                "times_bare": round(medians["ygivenx"] / medians["apply_chat_template"], 3),
                "tokens_per_second": {
                    "ygivenx": round(sum(map(len, sequences)) / medians["ygivenx"]),
                    "apply_chat_template": round(bare_tokens / medians["apply_chat_template"]),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
