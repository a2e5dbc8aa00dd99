"""The selective head against its peers and against the bare products: forward + backward on CPU.

    python benchmarks/head.py --cells 1024,576,49152,20,bfloat16 ... --out benchmarks/results/head.jsonl
    python benchmarks/head.py --table benchmarks/results/head.jsonl

A cell is N,H,V,percent trained,dtype. All contestants of a cell run in one process, in turns and in
random order, since who comes after whom decides whose memory is still at hand; medians are kept.
`limit` is the three products of the trained rows, x @ Wᵀ, g @ W and gᵀ @ x, as plain expressions; `limit, reused` has
its logits in a buffer that is already there. Peak memory is the growth of the resident set (VmHWM) over what was there
before, less dH and dW. A contestant that would take over --cap seconds a run is left out, and said to be.
torchtune (CEWithChunkedOutputLoss) runs if it is importable.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ygivenx import selective_cross_entropy
from ygivenx.head import kernel, pages

Step = Callable[[], None]
# Times the bare products of *all* positions that a run took at worst: what to leave out before it blocks the machine.
SLOW = {"transformers": 2, "TRL": 6, "torch": 24, "torchtune": 2}
RUNS = 9


class Cell:
    def __init__(self, n: int, h: int, v: int, percent: int, dtype: str) -> None:
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        self.trained = max(1, n * percent // 100)
        self.hidden = torch.randn(n, h).to(kind).requires_grad_()
        self.weight = (torch.randn(v, h) * 0.03).to(kind).requires_grad_()
        self.rows = torch.randperm(n)[: self.trained].sort().values
        self.targets = torch.randint(0, v, (self.trained,))
        self.labels = torch.full((n,), -100)
        self.labels[self.rows] = self.targets

    def backward(self, loss: Callable[[Cell], Tensor]) -> None:
        self.hidden.grad = self.weight.grad = None
        loss(self).backward()


def ours(cell: Cell) -> Tensor:
    weights = torch.full((cell.trained,), 1 / cell.trained)
    return selective_cross_entropy(cell.hidden, cell.weight, cell.rows, cell.targets, weights)[1]


def ours_plain(cell: Cell) -> Tensor:
    os.environ[kernel.SWITCH] = "0"
    try:
        return ours(cell)
    finally:
        del os.environ[kernel.SWITCH]


def select(cell: Cell) -> Tensor:
    logits = cell.hidden[cell.rows] @ cell.weight.T
    return torch.nn.functional.cross_entropy(logits.float(), cell.targets)


def transformers_loss(cell: Cell) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = cell.hidden @ cell.weight.T
    return ForCausalLMLoss(logits[None], None, logits.shape[-1], shift_labels=cell.labels[None])


def trl_loss(cell: Cell) -> Tensor:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    # As its fused head calls it where there is no Triton: every position is scored.
    per_token = _ChunkedLogProbFunction.apply(
        cell.hidden, cell.weight, None, cell.labels.clamp(min=0), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
        ("log_probs",),
    )  # fmt: skip
    return -per_token[0][cell.rows].mean()


def torch_loss(cell: Cell) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(
        cell.hidden, cell.weight, cell.labels, ignore_index=-100, options=torch.nn.LinearCrossEntropyOptions()
    )


def torchtune_loss(cell: Cell) -> Tensor:
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    chunks = [chunk @ cell.weight.T for chunk in cell.hidden[None].chunk(8, dim=1)]
    return CEWithChunkedOutputLoss()(chunks, cell.labels[None])


def cce_loss(cell: Cell) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(cell.hidden, cell.weight, cell.labels, impl="torch_compile")


LOSSES = {
    "ours": ours, "ours without kernel": ours_plain, "select": select, "transformers": transformers_loss,
    "TRL": trl_loss, "torch": torch_loss, "torchtune": torchtune_loss, "cut-cross-entropy": cce_loss,
}  # fmt: skip


def limits(cell: Cell) -> dict[str, Step]:
    x, weight = cell.hidden.detach()[cell.rows], cell.weight.detach()
    buffer = torch.randn(len(x), len(weight)).to(weight.dtype)

    def plain() -> None:
        g = x @ weight.T
        _ = g @ weight, g.T @ x

    def reused() -> None:
        torch.mm(x, weight.T, out=buffer)
        _ = buffer @ weight, buffer.T @ x

    return {"limit": plain, "limit, reused": reused}


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def peak_beyond_gradients(cell: Cell, step: Step) -> int:
    cell.hidden.grad = cell.weight.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from now on
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before - cell.hidden.nbytes - cell.weight.nbytes


def measure(spec: str, contestants: list[str], seconds: float, cap: float) -> dict[str, object]:
    *numbers, dtype = spec.split(",")
    n, h, v, percent = map(int, numbers)
    cell = Cell(n, h, v, percent, dtype)
    # Code that is loaded on first use isn't memory of the contestant that comes first.
    Cell(64, h, 1024, 100, dtype).backward(ours)
    steps: dict[str, Step] = limits(cell)
    first = {name: timed(step) for name, step in steps.items()}
    guess = first["limit"] * n / cell.trained
    skipped = [c for c in contestants if SLOW.get(c, 0) * guess > cap]
    steps |= {c: partial(cell.backward, LOSSES[c]) for c in contestants if c not in skipped}
    memory = {}
    for name in list(steps):
        try:
            memory[name] = peak_beyond_gradients(cell, steps[name])  # this is also the warm-up
        except (ImportError, RuntimeError) as error:
            skipped.append(f"{name}: {str(error).splitlines()[0][:120]}")
            del steps[name]
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(RUNS):  # a slow contestant gets fewer
        for name in order.sample(list(steps), len(steps)):
            if sum(times[name]) < seconds:
                times[name].append(timed(steps[name]))
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "n": n, "h": h, "v": v, "percent": percent, "dtype": dtype, "trained": cell.trained,
        "runs": {k: len(t) for k, t in times.items()}, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "milliseconds": {k: round(t * 1e3, 2) for k, t in medians.items()},
        "of_limit": {k: round(t / medians["limit"], 3) for k, t in medians.items()},
        "fastest_of_limit": {k: round(min(t) / min(times["limit"]), 3) for k, t in times.items()},
        "load": os.getloadavg()[0], "pages": "small" if pages.returns_free_pages() else "large",
        "peak_mb_beyond_gradients": {k: round(m / 2**20) for k, m in memory.items()},
        "left_out": skipped,
    }  # fmt: skip


def table(path: Path, fastest: bool) -> str:
    """The last measurement of every cell; a contestant that it left out keeps its earlier ratio to the limit."""
    kind = "fastest_of_limit" if fastest else "of_limit"
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for c in map(json.loads, path.read_text().splitlines()):
        spec = tuple(c[key] for key in ("n", "h", "v", "percent", "dtype"))
        cells[spec] = c | {kind: cells.get(spec, {kind: {}})[kind] | c[kind]}
    names = ["limit, reused", *LOSSES]
    head = ["N", "H", "V", "%", "dtype", "pages", "limit ms", *names, "our peak MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for spec, c in sorted(cells.items()):
        of = c[kind]
        ratios = [f"{of[n]:.2f}" if n in of else "" for n in names]
        first = [*spec, c.get("pages", "large"), c["milliseconds"]["limit"]]
        lines.append(
            "| " + " | ".join(map(str, [*first, *ratios, c["peak_mb_beyond_gradients"]["ours"]])) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="*", default=[], metavar="N,H,V,PERCENT,DTYPE")
    parser.add_argument("--contestants", default=",".join(LOSSES))
    parser.add_argument("--seconds", type=float, default=2, help="measuring time per contestant and cell")
    parser.add_argument("--cap", type=float, default=20, help="longest single run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print a result file as a table and stop")
    parser.add_argument(
        "--fastest", action="store_true", help="the table's ratios of fastest runs, not of medians"
    )
    args = parser.parse_args()
    if args.table:
        print(table(args.table, args.fastest))
        return
    for spec in args.cells:
        result = measure(spec, args.contestants.split(","), args.seconds, args.cap)
        print(json.dumps(result), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
