"""A run doesn't depend on how it is computed: twenty losses by every route, shared or not, whole or in chunks."""

from __future__ import annotations

import pytest
import torch
from tiny import llama
from trees import tree

import ygivenx as yx

STEPS = [tree(seed, count=6) for seed in range(20)]


def run(step) -> list[float]:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for rows in STEPS:
        optimizer.zero_grad()
        losses.append(step(model, rows))
        optimizer.step()
    return losses


def one(**options):
    def step(model, rows) -> float:
        value = yx.loss(model, rows, **options).value
        value.backward()
        return value.item()

    return step


def apart(model, rows, forests) -> float:
    weight = sum(float(r.weights.sum()) for r in rows)
    parts = [yx.loss(model, f, denominator=weight).value for f in forests]
    for part in parts:
        part.backward()
    return sum(p.item() for p in parts)


def in_packs(model, rows) -> float:
    return apart(model, rows, yx.pack(rows, max_tokens=50))


def unshared(model, rows) -> float:
    return apart(model, rows, [yx.Forest.of([r]) for r in rows])


def strangers(rows) -> list[list]:
    """Groups of which no two sequences begin alike."""
    groups: list[list] = []
    for r in rows:
        group = next((g for g in groups if all(r.ids[0] != other.ids[0] for other in g)), None)
        groups.append([r]) if group is None else group.append(r)
    return groups


def varlen(model, rows) -> float:
    weight = sum(float(r.weights.sum()) for r in rows)
    parts = [yx.loss(model, g, denominator=weight, route="varlen").value for g in strangers(rows)]
    for part in parts:
        part.backward()
    return sum(p.item() for p in parts)


def test_some_of_them_share_nothing():
    assert max(len(group) for rows in STEPS for group in strangers(rows)) > 2


@pytest.fixture(scope="module")
def dense() -> list[float]:
    return run(one(route="dense"))


@pytest.mark.parametrize(
    "step",
    [one(route="blocks"), one(chunk=25), in_packs, unshared, varlen],
    ids=["blocks", "in chunks", "in packs", "unshared", "varlen"],
)
def test_twenty_losses_are_the_same(step, dense):
    assert len(set(dense)) == len(STEPS)
    assert run(step) == pytest.approx(dense, rel=1e-5)
