"""Run by tests/test_ranks.py in one process or several: yx.loss of a wrapped model in a loop of one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import llama, sequences

import ygivenx as yx


def compute(out: Path, chunk: int, rank: int, ranks: int) -> None:
    rows = sequences(7, seed=5)
    model = torch.nn.parallel.DistributedDataParallel(llama()) if ranks > 1 else llama()
    step_weight = sum(float(s.weights.sum()) for s in rows)
    found = yx.loss(model, rows[rank::ranks], denominator=step_weight / ranks, chunk=chunk or None)
    found.value.backward()
    value = found.value.detach() / ranks
    if ranks > 1:
        dist.all_reduce(value)
    if rank == 0:
        grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.save({"loss": float(value), "grad": grad}, out)


def main(out: Path, chunk: int) -> None:
    if not dist.is_torchelastic_launched():
        compute(out, chunk, 0, 1)
        return
    dist.init_process_group("gloo")
    compute(
        out, chunk, dist.get_rank(), dist.get_world_size()
    )  # the wrapper has to be gone before its group is
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
