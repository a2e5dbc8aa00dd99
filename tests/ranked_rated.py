"""Run by tests/test_ranks.py in one process or several: DPO on three rows, two steps, and what evaluation measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_preference_trainer import make, row


def main(out: Path, accumulation: int) -> None:
    rows = [row(i) for i in range(3)]
    trainer = make(
        out.parent / out.stem, rows, eval_dataset=rows, max_tokens=1, max_steps=2, max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation, learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    measured = {k: v for k, v in trainer.evaluate().items() if k != "eval_runtime"}
    weights = torch.cat(
        [p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
    )
    if trainer.is_world_process_zero():
        found = {"losses": [e["loss"] for e in logged], "margins": [e["margin"] for e in logged]}
        torch.save({**found, "weights": weights, "measured": measured}, out)
    trainer.end_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
