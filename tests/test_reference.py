"""The reference's own examples, and the fast library against it: tables of what is equal, and how nearly."""

from __future__ import annotations

import doctest
from collections import Counter

import numpy as np
import pytest
from templates.conversations import ALL
from templates.stock import stock_templates, stops_for, tokenizer_for
from tiny import llama
from trees import tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.sequence import Segment

TEMPLATES = stock_templates()
# Templates for which the reference proves nothing: their turns end in the next header, their prompts write what stored
# replies lack, or they take lists of parts alone.
UNPROVEN = {"glm4moe", "deepseek_r1_distill", "deepseekv3", "idefics3", "llava_next", "smolvlm"}
PROVEN = [name for name in TEMPLATES if not name.endswith("_training") and name not in UNPROVEN]


def test_the_examples_run():
    assert yx.reference is reference
    done = doctest.testmod(reference)
    assert done.attempted >= 15
    assert done.failed == 0


def against_reference(name: str) -> Counter[str]:
    """Each conversation that the reference can encode: the encoder's ids and weights are the same, to the bit."""
    tokenizer, found = tokenizer_for(name, TEMPLATES[name]), Counter()
    encoder = yx.Encoder(tokenizer, stops=stops_for(name))
    for title, row in ALL.items():
        try:
            expected = reference.encode(tokenizer, row, stops_for(name))
        except yx.RowError as error:
            found[error.reason] += 1
            continue
        got = encoder(row).sequences
        assert [(s.ids.tolist(), s.weights.tolist()) for s in got] == [
            (s.ids.tolist(), s.weights.tolist()) for s in expected
        ], f"{name} × {title}"
        found["single" if len(got) == 1 else "split"] += 1
    return found


@pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")
@pytest.mark.parametrize("name", PROVEN)
def test_encoder(name):
    found = against_reference(name)
    assert found["single"] + found["split"] >= 7, found


def test_loss_of_a_forest():
    """−Σ w·log p / W: by sequence, by prefix, and by the library, for sequences that share much."""
    model, rows = llama(), tree(seed=3)
    expected = reference.loss(model, rows).item()
    assert reference.forest_loss(model, rows).item() == pytest.approx(expected, rel=1e-6)
    assert yx.loss(model, rows).value.item() == pytest.approx(expected, rel=1e-6)


def test_forest():
    """Node by node: the same prefixes, in some order, with the same weights."""
    rows = tree(seed=4)
    forest, expected = yx.Forest.of(rows), reference.forest(rows)
    prefixes = {}
    for path in forest.paths:
        for t, node in enumerate(path.tolist(), 1):
            prefixes[tuple(forest.token[path[:t]].tolist())] = float(forest.weight[node])
    assert len(forest) == len(expected)
    assert prefixes == pytest.approx(expected, rel=1e-6)


def test_score_and_ledger():
    model, s = llama(), tree(seed=5, count=1, low=20)[0]
    x, y = s.ids[:8].tolist(), s.ids[8:].tolist()
    segments = (Segment(0, 8, "prompt"), Segment(8, len(s), "answer", output=True))
    pair = yx.Sequence(s.ids, np.r_[np.zeros(8), np.ones(len(y))], segments)
    expected, ledger = reference.score(model, x, y), yx.ledger(model, pair)
    got = ledger.joint, ledger.marginal, ledger.conditional, ledger.conditional_by_difference
    assert got == pytest.approx(tuple(expected), rel=1e-5)
