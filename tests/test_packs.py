"""Packs: what makes two runs the same run, what one sequence counts, and equally many steps on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import llama, sequences

import ygivenx as yx
from ygivenx import reference
from ygivenx.training.packs import EpochOrder, Packs


def packs(rows, **options) -> Packs:
    return Packs(rows, max_tokens=40, seed=0, **options)


def test_a_fingerprint_tells_ids_weights_and_order_apart():
    rows = sequences(4)
    s = rows[0]
    same = packs(list(rows)).fingerprint
    assert packs(rows).fingerprint == same
    half = yx.Sequence(s.ids, s.weights * 0.5, s.segments)
    other = yx.Sequence(np.r_[s.ids[:-1], (s.ids[-1] + 1) % 90], s.weights, s.segments)
    changed = [[half, *rows[1:]], [other, *rows[1:]], rows[1:]]
    assert len({same, *(packs(r).fingerprint for r in changed)}) == 4
    assert packs(rows, denominator="sequence").fingerprint != same


def test_a_mean_per_sequence_is_the_reference_s():
    model, rows = llama(), sequences(5, seed=2)
    forests = [pack["forest"] for pack in packs(rows, denominator="sequence")]
    value = sum(yx.loss(model, f, denominator=len(rows)).value.item() for f in forests)
    assert value == pytest.approx(reference.loss(model, rows, "sequence").item(), rel=1e-6)


def test_the_places_of_packs_are_told_apart():
    """The same sequences in the same order, up to two or three to a pack."""
    rows = sequences(6, low=10, high=11)
    two, three = (Packs(rows, max_tokens=n, seed=0) for n in (20, 30))
    assert two.plan.members.tolist() == three.plan.members.tolist()
    assert len(two) > len(three)
    assert two.fingerprint != three.fingerprint


def test_ranks_get_equally_many_and_what_weighs_nothing_is_left_out():
    rows = sequences(3)
    silent = yx.Sequence(np.arange(30, 65), np.zeros(35))
    made = packs([*rows, silent])
    assert made.skipped == 1
    weight = sum(pack["forest"].weight.sum() for pack in made)
    made.fill(len(made) + 1)
    assert made.fillers == 1
    assert sum(pack["forest"].weight.sum() for pack in made) == weight
    assert made[len(made) - 1]["names"] == ["a filler"]


def test_an_order_is_a_function_of_seed_and_epoch():
    orders = [list(EpochOrder(9, seed, epoch)) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) == 3
    assert all(sorted(o) == list(range(9)) for o in orders)
