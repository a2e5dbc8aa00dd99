"""DPO (Rafailov et al. 2023) over a preference pair as one forest: the prompt is computed once, forward and backward.

    python examples/dpo.py

The reference model's log-probabilities come from the same forest. Any other loss of log-probabilities goes like this.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.functional import logsigmoid

import ygivenx as yx
from ygivenx.head.selective import log_probs
from ygivenx.models.model import head_of, hidden_states


def log_p_of_y(model: Any, forest: yx.Forest) -> torch.Tensor:
    """log Pr(y|x) of each path of the forest, differentiable: the log-probs of its nodes with a weight."""
    edges = forest.edges()
    hidden, head = hidden_states(model, forest), head_of(model)
    rows, targets = (torch.from_numpy(a).to(hidden.device) for a in (edges.rows, edges.targets))
    by_edge = log_probs(hidden, rows=rows, targets=targets, **head._asdict())
    place = {node: e for e, node in enumerate(edges.nodes.tolist())}
    of_path = [[place[v] for v in path.tolist() if v in place] for path in forest.paths]
    return torch.stack([by_edge[edges_of].sum() for edges_of in of_path])


def dpo(
    model: Any, reference: Any, chosen: yx.Sequence, rejected: yx.Sequence, beta: float = 0.1
) -> torch.Tensor:
    """−log σ(β·[(log π/π_ref)(chosen) − (log π/π_ref)(rejected)])."""
    forest = yx.Forest.of([chosen, rejected])
    with torch.no_grad():
        before = log_p_of_y(reference, forest)
    gain = log_p_of_y(model, forest) - before
    return -logsigmoid(beta * (gain[0] - gain[1]))


def main() -> None:
    model, tokenizer = yx.load("sample")
    reference = copy.deepcopy(model)
    encoder = yx.Encoder(tokenizer)
    rows = [{"x": "The capital of France is", "y": y} for y in (" Paris.", " Lyon.")]
    chosen, rejected = (encoder(row).only for row in rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for step in range(3):
        loss = dpo(model, reference, chosen, rejected)
        print(f"step {step}: {loss.item():.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
