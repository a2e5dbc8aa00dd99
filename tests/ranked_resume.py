"""Run by tests/test_ranks.py in two processes: resumed in a later epoch, and the best model, as each rank has them."""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_trainer import make
from tiny import llama, sequences

from ygivenx.errors import CheckpointError, ConfigError


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def resumed(folder: Path, rank: int) -> bool:
    """Whether a run that goes on in the midst of its second epoch ends in the same bits."""
    settings = {"num_train_epochs": 2, "save_steps": 1, "max_tokens": 48, "learning_rate": 1e-2}
    straight = make(folder / "straight", sequences(15, seed=4), **settings)
    straight.train()
    middle = f"checkpoint-{straight.state.global_step - 1}"
    if rank == 0:
        shutil.copytree(folder / "straight" / middle, folder / "again" / middle)
    dist.barrier()
    again = make(folder / "again", sequences(15, seed=4), model=llama(seed=9), **settings)
    again.train(resume_from_checkpoint="auto")
    return torch.equal(weights(straight), weights(again))


def best(folder: Path) -> torch.Tensor:
    """The best model's weights; it isn't the last one."""
    data = sequences(9, seed=4)
    trainer = make(
        folder / "best", data, max_steps=6, save_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=data,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < 6
    return weights(trainer)


def apart(folder: Path, rank: int) -> str:
    """What each rank is told where they don't see one output directory."""
    trainer = make(folder / f"apart{rank}", sequences(9, seed=4), max_steps=1, save_steps=1)
    try:
        trainer.train()
    except CheckpointError as error:
        return error.what
    return ""


def sharded(folder: Path) -> str:
    """What is said of FSDP, which accelerate leaves out without GPUs."""
    try:
        make(folder / "fsdp", sequences(9, seed=4), fsdp="full_shard", fsdp_config={"version": 2})
    except ConfigError as error:
        return error.what
    return ""


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    told: list[Any] = [None] * count
    dist.all_gather_object(
        told, (resumed(out.parent, rank), best(out.parent), apart(out.parent, rank), sharded(out.parent))
    )
    if rank == 0:
        resumes, bests, aparts, fsdp = zip(*told, strict=True)
        agreed = [torch.equal(w, bests[0]) for w in bests]
        torch.save({"resumed": list(resumes), "best": agreed, "apart": list(aparts), "fsdp": fsdp[0]}, out)
    gc.collect()  # the wrapper has to be gone before its group is: see Trainer.end_ranks
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
