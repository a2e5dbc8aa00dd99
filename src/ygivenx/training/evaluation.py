"""How well a model does on rows that it isn't trained on: nats per token of y, and of x, apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..forest import Forest, pack
from ..models.streaming import ONE_PASS
from ..models.wrappers import sharded, through
from ..scores.node_log_probs import Float64s, node_log_probs
from ..sequence import Sequence
from .packs import flatten, per_sequence


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    max_tokens: int,
    rank: int = 0,
    ranks: int = 1,
    denominator: str = "tokens",
) -> torch.Tensor:
    """Sums over the data, float64 [6]: Σ log p and tokens of y, of x, Σ w·log p and Σ w.

    denominator: as in training, so that the two losses are one quantity.
    """
    sequences, _ = flatten(data)
    if denominator == "sequence":
        sequences = per_sequence(sequences)
    packs = pack(sequences, max_tokens=max_tokens)
    own = packs[rank::ranks]
    sums = np.zeros(6)
    was_training = model.training
    model.eval()
    try:
        for forest in own:
            by_node = _log_p(model, forest)
            for member, path in zip(forest.members, forest.paths, strict=True):
                sums += _role_sums(sequences[member], by_node[path])
        if sharded(model) and len(own) < len(packs[::ranks]):
            _log_p(model, packs[0])  # gathers the weights once more, as the other ranks do
    finally:
        model.train(was_training)
    return torch.from_numpy(sums)


def rates(sums: torch.Tensor) -> dict[str, float]:
    """Nats per token from the sums of `evaluate`; a role without tokens is left out."""
    y, n_y, x, n_x, weighted, weight = sums.tolist()
    parts = {"loss": (-weighted, weight), "conditional_nats": (-y, n_y), "marginal_nats": (-x, n_x)}
    return {name: total / count for name, (total, count) in parts.items() if count}


def _log_p(model: nn.Module, forest: Forest) -> Float64s:
    if not sharded(model):
        return node_log_probs(model, forest)
    return through(model, lambda inner: node_log_probs(inner, forest, chunk=ONE_PASS))


def _role_sums(s: Sequence, log_p: np.ndarray) -> np.ndarray:
    output = s.output
    x = ~output & ~np.isnan(log_p)
    w = s.weights.astype(np.float64)
    return np.array(
        [log_p[output].sum(), output.sum(), log_p[x].sum(), x.sum(), np.nansum(w * log_p), math.fsum(w)]
    )
