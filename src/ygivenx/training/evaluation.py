"""How well a model does on rows that it isn't trained on: nats per token of y, and of x, apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..choices import Denominator
from ..encoded import EncodedRows
from ..forest import Forest
from ..models.streaming import ONE_PASS
from ..models.wrappers import inside_forward, sharded
from ..scores.node_log_probs import Float64s, NodeValues, node_values
from ..sequence import Sequence
from .packs import plan_of, weighed


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    max_tokens: int,
    rank: int = 0,
    ranks: int = 1,
    denominator: Denominator = "tokens",
) -> torch.Tensor:
    """Sums over the data, float64 [8]: Σ log p and tokens of y, of x, Σ w·log p and Σ w, tokens of y that come first,
    Σ entropy of what predicts y.

    denominator: as in training, so that the two losses are one quantity.
    """
    rows = EncodedRows.of(data)
    packs = plan_of(rows, max_tokens)
    own = range(rank, len(packs), ranks)
    sums = np.zeros(8)
    was_training = model.training
    model.eval()
    try:
        for number in own:
            sequences = [weighed(rows[i], denominator) for i in packs[number]]
            forest = Forest.of(sequences)
            values = _values(model, forest)
            for sequence, path in zip(sequences, forest.paths, strict=True):
                sums += _role_sums(sequence, values.of(path))
        if sharded(model) and len(own) < len(range(0, len(packs), ranks)):
            # gathers the weights once more, as the other ranks do
            _values(model, Forest.of(rows.bare(i) for i in packs[0]))
    finally:
        model.train(was_training)
    return torch.from_numpy(sums)


def rates(sums: torch.Tensor) -> dict[str, float]:
    """Nats per token from the sums of `evaluate`; a role without tokens is left out.

    token_accuracy: the share of tokens of y that are the most probable ones. entropy: of the distributions that predict
    y, in nats.
    """
    y, n_y, x, n_x, weighted, weight, first, entropy = sums.tolist()
    parts = {
        "loss": (-weighted, weight), "conditional_nats": (-y, n_y), "marginal_nats": (-x, n_x),
        "token_accuracy": (first, n_y), "entropy": (entropy, n_y),
    }  # fmt: skip
    return {name: total / count for name, (total, count) in parts.items() if count}


def _values(model: nn.Module, forest: Forest) -> NodeValues:
    if not sharded(model):
        return node_values(model, forest, entropy=True)
    return inside_forward(model, lambda inner: node_values(inner, forest, chunk=ONE_PASS, entropy=True))


def _role_sums(s: Sequence, values: NodeValues) -> Float64s:
    log_p, rank, entropy = values.log_p, values.rank, values.entropy
    assert entropy is not None
    output = s.output
    x = ~output & ~np.isnan(log_p)
    w = s.weights.astype(np.float64)
    return np.array(
        [
            log_p[output].sum(),
            output.sum(),
            log_p[x].sum(),
            x.sum(),
            np.nansum(w * log_p),
            math.fsum(w),
            (rank[output] == 0).sum(),
            np.nansum(entropy[output]),
        ]
    )
