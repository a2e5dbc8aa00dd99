"""Run by tests/test_ranks.py in one process or several: trains a few steps, writes gradients and losses."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from test_trainer import make
from tiny import sequences
from torch.nn.parallel import DistributedDataParallel


def trained(folder: Path, rows: int, max_tokens: int, accumulation: int) -> tuple[Any, dict[str, Any]]:
    trainer = make(
        folder, sequences(rows, seed=5), max_tokens=max_tokens, max_steps=2, logging_steps=1,
        gradient_accumulation_steps=accumulation, max_grad_norm=0.0, learning_rate=1e-3, save_strategy="no",
    )  # fmt: skip
    grads: list[torch.Tensor] = []

    def keep(optimizer, *_):
        grads.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]))

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, {"grads": grads, "losses": losses, "packs": len(trainer.train_dataset)}


def main(out: Path, cases: list[list[int]]) -> None:
    found = []
    for i, case in enumerate(cases):
        trainer, values = trained(out.parent / f"{out.stem}-{i}", *case)
        found.append(values)
    if trainer.is_world_process_zero():
        torch.save(found, out)
    trainer.end_ranks()
    assert not any(type(o) is DistributedDataParallel for o in gc.get_objects())


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
