"""DPO (Rafailov et al. 2023) over preference pairs as one forest: each prompt is computed once, forward and backward.

    python examples/dpo.py

The reference's log-probabilities come from the same forest. Any other loss of log-probabilities goes like this.
"""

from __future__ import annotations

import copy

import torch

import ygivenx as yx
from ygivenx.objectives import dpo


def main() -> None:
    model, tokenizer = yx.load("sample")
    encoder = yx.Encoder(tokenizer)
    rows = [{"x": "The capital of France is", "y": y} for y in (" Paris.", " Lyon.")]
    batch = yx.Targets.of([encoder(row) for row in rows])  # chosen, rejected
    with torch.no_grad():
        before = yx.log_probs(copy.deepcopy(model), batch).sums()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for step in range(3):
        chosen, rejected = yx.log_probs(model, batch).sums()
        loss = dpo(chosen, rejected, *before, beta=0.1)
        print(f"step {step}: {loss.item():.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
