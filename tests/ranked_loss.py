"""Run by tests/test_ranks.py in one process or several: yx.loss of a wrapped model in a loop of one's own."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import llama, sequences
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ygivenx as yx
from ygivenx.training.evaluation import evaluate


def wrapped(model: Any, sharded: bool) -> Any:
    if not sharded:
        return torch.nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compute(chunk: int, sharded: bool, rank: int, ranks: int) -> dict[str, Any]:
    rows = sequences(7, seed=5)
    model = wrapped(llama(), sharded) if ranks > 1 else llama()
    step_weight = sum(float(s.weights.sum()) for s in rows)
    found = yx.loss(model, rows[rank::ranks], denominator=step_weight / ranks, chunk=chunk or None)
    found.value.backward()
    value = found.value.detach() / ranks
    whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    sums = torch.zeros(7, dtype=torch.float64)
    if sharded or ranks == 1:
        sums = evaluate(model, rows, max_tokens=24, rank=rank, ranks=ranks)
    if ranks > 1:
        dist.all_reduce(value)
        dist.all_reduce(sums)
    return {"loss": float(value), "grad": torch.cat([g.flatten() for g in whole]), "sums": sums}


def main(out: Path, cases: list[tuple[int, bool]]) -> None:
    several = dist.is_torchelastic_launched()
    if several:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    found = [compute(chunk, sharded, rank, ranks) for chunk, sharded in cases]
    if rank == 0:
        torch.save(found, out)
    if several:
        gc.collect()  # the wrapper has to be gone before its group is: see Trainer.end_ranks
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
