"""Scores at the price of the distinct tokens: lm-evaluation-harness's HF class and ours on the same requests.

    python benchmarks/score.py batch fewshot               # the HF class's best batch size, on the first requests
    python benchmarks/score.py hf fewshot --part 0/2       # its time, part by part: its cost is a sum
    python benchmarks/score.py ours fewshot                # ours, and one by one for the limit
    python benchmarks/score.py memory                      # peak memory from 1,000 to 100,000 pairs
    python benchmarks/score.py table                       # what benchmarks/results/score.jsonl says

Model: SmolLM2-135M-Instruct. Requests from gsm8k and xquad beside the checkout. Both sides get texts: tokenising is
in both times. Each line of the results carries the command that made it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "score.jsonl"
TURNS = 7
Pairs = list[tuple[str, str]]


def gsm8k() -> Iterator[tuple[str, str, int]]:
    """(question, worked answer, final number) of the rows whose answer is a whole number."""
    for line in (DATA / "gsm8k/train.jsonl").read_text().splitlines():
        row = json.loads(line)
        final = row["answer"].rpartition("#### ")[2]
        if re.fullmatch(r"\d+", final):
            yield row["question"], re.sub("<<.*?>>", "", row["answer"]), int(final)


def fewshot(letters: bool = False) -> Pairs:
    """Five worked examples, about 600 tokens, then 40 questions with four answers each, or with four letters."""
    rows = list(gsm8k())[:45]
    shots = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a, _ in rows[:5])
    pairs = []
    for q, _, n in rows[5:]:
        choices = [f" {v}" for v in (n, n + 1, n + 10, 2 * n + 3)]
        text = f"{shots}Question: {q}\n"
        if letters:
            text += "".join(f"{letter}.{c}\n" for letter, c in zip("ABCD", choices, strict=True))
            choices = [" A", " B", " C", " D"]
        pairs += [(f"{text}Answer:", c) for c in choices]
    return pairs


def alone() -> Pairs:
    """64 questions with their worked answers: nothing in common."""
    return [(f"{q}\n", a) for q, a, _ in list(gsm8k())[100:164]]


def xquad() -> Pairs:
    """The questions of 16 passages, each with four answers from its passage."""
    pairs = []
    passages = [
        p for a in json.loads((DATA / "xquad/xquad.en.json").read_text())["data"] for p in a["paragraphs"]
    ]
    for passage in passages[:16]:
        answers = list(dict.fromkeys(q["answers"][0]["text"] for q in passage["qas"]))[:4]
        for q in passage["qas"]:
            text = f"{passage['context']}\n\nQuestion: {q['question']}\nAnswer:"
            pairs += [(text, f" {a}") for a in answers]
    return pairs


SCENARIOS = {
    "fewshot": fewshot,
    "letters": lambda: fewshot(letters=True),
    "alone": alone,
    "xquad": xquad,
}


def load(dtype: str) -> tuple[Any, Any]:
    import ygivenx as yx
    from ygivenx.models.resolve import sample_model_path

    path, gguf_file = sample_model_path()
    return yx.load(path, gguf_file=gguf_file, dtype=getattr(torch, dtype))


def requests(pairs: Pairs) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def timed(lm: Any, pairs: Pairs) -> tuple[float, list[float]]:
    began = time.perf_counter()
    told = lm.loglikelihood(requests(pairs), disable_tqdm=True)
    return time.perf_counter() - began, [v for v, _ in told]


def hf(model: Any, tokenizer: Any, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def ours(model: Any, tokenizer: Any, **options: Any) -> Any:
    from ygivenx.scores.harness import ForestLM

    return ForestLM(pretrained=model, tokenizer=tokenizer, **options)


def run_batch(args: argparse.Namespace, pairs: Pairs) -> dict[str, Any]:
    """Seconds of the HF class on some requests by batch size, after one that warms up."""
    model, tokenizer = load(args.dtype)
    if args.scenario in ("alone", "xquad"):  # of all lengths; where questions share, whole questions
        pairs = every(pairs, args.count)
    few = pairs[: args.count]
    timed(hf(model, tokenizer, 1), pairs[:1])
    return {
        "seconds": {b: timed(hf(model, tokenizer, b), few)[0] for b in args.batches},
        "requests": len(few),
    }


def every(pairs: Pairs, count: int) -> Pairs:
    """About `count` of them, from everywhere."""
    return pairs[:: max(1, len(pairs) // count)]


def run_hf(args: argparse.Namespace, pairs: Pairs) -> dict[str, Any]:
    args.batch = args.batch or best(args.scenario, args.dtype)
    model, tokenizer = load(args.dtype)
    number, parts = map(int, args.part.split("/"))
    # Parts take whole questions: letters of one question share a forward pass.
    size = -(-len(pairs) // (4 * parts)) * 4
    mine = pairs[number * size : (number + 1) * size]
    timed(hf(model, tokenizer, 1), pairs[:1])
    runs = [timed(hf(model, tokenizer, args.batch), mine) for _ in range(args.runs)]
    seconds = statistics.median(s for s, _ in runs)
    return {
        "seconds": seconds,
        "runs": [s for s, _ in runs],
        "batch": args.batch,
        "part": args.part,
        "values": runs[-1][1],
    }


def best(scenario: str, dtype: str) -> int:
    """The batch size that `batch` found best for a scenario."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    key = "batch", scenario, dtype
    seconds = next(r["seconds"] for r in rows if (r["what"], r["scenario"], r["dtype"]) == key)
    return int(min(seconds, key=seconds.__getitem__))


def run_ours(args: argparse.Namespace, pairs: Pairs) -> dict[str, Any]:
    """All, then some requests one by one, whose pace is what sharing is held to: TURNS times, after a round unmeasured.

    limit: tokens per distinct token, what sharing could bring at most if every token cost the same. work_limit: the
    same in multiplications, which grow with a token's depth. Shares: seconds that the distinct tokens (or their
    multiplications) would take at the pace of one by one, divided by our seconds.
    """
    model, tokenizer = load(args.dtype)
    some = every(pairs, args.count)
    timed(ours(model, tokenizer), pairs)
    runs, rounds = [], []
    for _ in range(TURNS):
        runs.append((lm := ours(model, tokenizer), *timed(lm, pairs)))
        rounds.append([(each := ours(model, tokenizer), *timed(each, [pair])) for pair in some])
    (lm, _, values), told = runs[-1], rounds[-1]
    single = statistics.median(sum(s for _, s, _ in told) for told in rounds)
    tokens = sum(each.tally.tokens for each, _, _ in told)
    median = statistics.median(s for _, s, _ in runs)
    alone, shared = work(lm, pairs), work(lm, pairs, together=True)
    return {
        "seconds": median,
        "runs": [s for _, s, _ in runs],
        "one_by_one_runs": [sum(s for _, s, _ in told) for told in rounds],
        "requests": len(pairs),
        "tokens": lm.tally.tokens,
        "distinct": lm.tally.distinct,
        "limit": lm.tally.sharing,
        "work_limit": alone / shared,
        "one_by_one_tokens_per_second": tokens / single,
        "share_of_limit": lm.tally.distinct * single / tokens / median,
        "share_of_work_limit": shared * single / work(lm, some) / median,
        "worst_difference_to_one_by_one_nats": max(
            abs(a - b) for (_, _, (a,)), b in zip(told, every(values, args.count), strict=True)
        ),
        "values": values,
    }


def work(lm: Any, pairs: Pairs, together: bool = False) -> float:
    """Multiplications of the pairs' log-likelihoods (weights, attention, head), one by one or in one forest."""
    import numpy as np

    from ygivenx.forest import Forest

    config = lm.model.config
    layers = [m for m in lm.model.model.modules() if isinstance(m, torch.nn.Linear)]
    per_token = sum(m.weight.numel() for m in layers)
    per_key = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    asked = [lm._question((None, *lm._encode_pair(*pair))).sequences[0] for pair in pairs]
    total = 0.0
    for sequences in [asked] if together else [[s] for s in asked]:
        forest = Forest.of(sequences)
        rows = {
            int(forest.parent[n])
            for s, path in zip(sequences, forest.paths, strict=True)
            for n in path[s.output]
        }
        total += len(forest.fed) * per_token + float(np.sum(forest.depth[forest.fed] + 1)) * per_key
        total += len(rows) * lm.model.lm_head.weight.numel()
    return total


def run_memory(args: argparse.Namespace, _: Pairs) -> dict[str, Any]:
    """Peak memory of a process that scores N pairs with a random two-layer model, by N."""
    code = "import sys; sys.path.insert(0, 'benchmarks'); import score; score.score_many(int(sys.argv[1]))"
    told = {}
    for n in (1_000, 3_000, 10_000, 30_000, 100_000):
        done = subprocess.run(
            [sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        told[n] = json.loads(done.stdout.splitlines()[-1])
    RESULTS.with_name("score-memory.svg").write_text(plot(told))
    return {"by_pairs": told}


def score_many(count: int) -> None:
    """Score made-up pairs, eight to a passage, and say the peak of this process."""
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    from ygivenx.models.memory import keep_freed_memory
    from ygivenx.scores.requests import Request, ScoredPart, pair_of_ids
    from ygivenx.scores.scoring import Tally, scores

    keep_freed_memory()  # as `ygx score` does
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)

    def questions() -> Iterator[Request]:
        for i in range(count):
            if i % 8 == 0:
                passage = rng.integers(0, 512, 40).tolist()
            yield Request((ScoredPart(pair_of_ids(passage + rng.integers(0, 512, 10).tolist(), [1, 2, 3])),))

    tally = Tally()
    for _ in scores(model, questions(), marginal=False, tally=tally):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": peak, "seconds": tally.seconds, "sharing": tally.sharing}))


def table(_: argparse.Namespace) -> None:
    """The results as Markdown."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    heads = "scenario, requests", "dtype", "limit", "HF class (batch)", "ours", "times faster", "share of the limit", \
        "share by work", "largest difference, nats: HF class", "one by one"  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for mine in (r for r in rows if r["what"] == "ours"):
        key = mine["scenario"], mine["dtype"]
        parts = [r for r in rows if r["what"] == "hf" and (r["scenario"], r["dtype"]) == key]
        cells = [f"{key[0]}, {mine['requests']}", key[1], f"{mine['limit']:.1f}", *theirs(mine, parts)]
        cells[4:4] = [f"{mine['seconds']:.2f} s"]
        cells[6:6] = [f"{mine['share_of_limit']:.2f}", f"{mine['share_of_work_limit']:.2f}"]
        print(f"| {' | '.join(cells)} | {mine['worst_difference_to_one_by_one_nats']:.0e} |")
    print(*to_float64(rows), sep="\n")


def to_float64(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How far float32 values are from those of the HF class in float64, where that was run."""
    for exact in (r for r in rows if r["what"] == "hf" and r["dtype"] == "float64"):
        for r in (r for r in rows if r["dtype"] == "float32" and r["scenario"] == exact["scenario"]):
            if "values" in r:
                worst = max(abs(a - b) for a, b in zip(r["values"], exact["values"], strict=True))
                name = "the HF class" if r["what"] == "hf" else "ours"
                yield f"{exact['scenario']}: {name} in float32 is off by {worst:.1e} nats at most"


def theirs(mine: dict[str, Any], parts: list[dict[str, Any]]) -> list[str]:
    """The HF class's seconds, how often ours fit into them, and how far its values are from ours."""
    if not parts:
        return ["not measured", "", ""]
    seconds = sum(p["seconds"] for p in parts)
    values = [v for p in sorted(parts, key=lambda p: p["part"]) for v in p["values"]]
    worst = max(abs(a - b) for a, b in zip(mine["values"], values, strict=True))
    return [f"{seconds:.1f} s ({parts[0]['batch']})", f"{seconds / mine['seconds']:.3g}", f"{worst:.0e}"]


def plot(told: dict[str, Any]) -> str:
    """Peak memory (MB) by pairs (logarithmic) as an SVG."""
    points = [(int(n), v["peak_mb"]) for n, v in told.items()]
    top = max(mb for _, mb in points) * 1.2
    places = [(60 + 130 * (math.log10(n) - 3) * 2, 180 - 160 * mb / top, n, mb) for n, mb in points]
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y, _, _ in places)
    labels = "".join(
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3"/><text x="{x:.0f}" y="{y - 8:.0f}">{mb:.0f}</text>'
        f'<text x="{x:.0f}" y="198">{n:,}</text>'
        for x, y, n, mb in places
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 220" font-family="sans-serif" font-size="11" '
        'text-anchor="middle"><rect width="640" height="220" fill="white"/>'
        f'<polyline points="{line}" fill="none" stroke="black"/>{labels}'
        '<text x="320" y="215">pairs scored</text><text x="60" y="14">peak MB of the process</text></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("batch", "hf", "ours", "memory", "table"))
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, default="fewshot")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, help="by default what `batch` found best")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--runs", type=int, default=1, help="of the HF class, which takes long")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--count", type=int, default=16)
    args = parser.parse_args()
    if args.what == "table":
        return table(args)
    run = {"batch": run_batch, "hf": run_hf, "ours": run_ours, "memory": run_memory}[args.what]
    result = run(args, [] if args.what == "memory" else SCENARIOS[args.scenario]())
    head = {"what": args.what, "scenario": args.scenario, "dtype": args.dtype}
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.processor()}
    line = (
        head
        | result
        | {"machine": machine, "command": "python benchmarks/score.py " + " ".join(sys.argv[1:])}
    )
    with RESULTS.open("a") as out:
        out.write(json.dumps(line) + "\n")
    print({k: v for k, v in line.items() if k != "values"})


if __name__ == "__main__":
    main()
