"""Random branching sequences, and what compares gradients of two ways to compute the same."""

from __future__ import annotations

import numpy as np
import torch
from tiny import VOCAB

from ygivenx.sequence import Sequence


def tree(seed: int = 0, count: int = 10, low: int = 3, high: int = 40, vocab: int = VOCAB) -> list[Sequence]:
    """Most continue a cut of an earlier one; some are whole prefixes of others, and one comes twice."""
    rng = np.random.default_rng(seed)
    rows: list[Sequence] = []
    for _ in range(count):
        ids = rng.integers(0, vocab, int(rng.integers(low, high)))
        if rows and rng.random() < 0.8:
            before = rows[rng.integers(len(rows))].ids
            cut = int(rng.integers(1, len(before) + 1))
            ids = np.concatenate((before[:cut], ids)) if rng.random() < 0.8 else before[:cut].copy()
        weights = rng.random(len(ids)).astype(np.float32) * (rng.random(len(ids)) < 0.6)
        weights[0] = 0
        rows.append(Sequence(ids, weights))
    return [*rows, rows[0]]


def gradients(model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distances(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> list[float]:
    """Of each tensor's gradient, relative, L2."""
    return [float((ours[n].double() - g).norm() / g.norm()) for n, g in exact.items()]


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 3e-5
) -> None:
    """Relative L2 distance per tensor; what nobody trained may be absent on either side."""
    assert any(g.any() for g in theirs.values())
    for name in ours.keys() | theirs.keys():
        a, b = (g.get(name, torch.zeros(())) for g in (ours, theirs))
        # A gradient that is zero but for rounding (a key's bias under softmax) has no relative error.
        floor = 1e-6 * max(g.norm() for g in theirs.values())
        assert (a - b).norm() <= tolerance * b.norm() + floor, name
