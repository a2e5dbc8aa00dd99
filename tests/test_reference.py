"""The reference's own examples, and the fast library against it: tables of what is equal, and how nearly."""

from __future__ import annotations

import doctest
import re
from collections import Counter
from importlib import import_module

import numpy as np
import pytest
import torch
from templates.conversations import ALL
from templates.stock import stock_templates, stops_for, tokenizer_for
from tiny import VOCAB, llama, score_sequences
from trees import tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.scores.node_log_probs import node_log_probs
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
    assert found["single"] + found["split"] >= 5, found  # templates that only think have few proven rows


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


SPLIT = 8  # tokens of x in PAIR
ROWS, PAIR = tree(seed=3), tree(seed=5, count=1, low=20)[0]
PAIR = yx.Sequence(
    PAIR.ids,
    np.r_[np.zeros(SPLIT), np.ones(len(PAIR) - SPLIT)],
    (Segment(0, SPLIT, "prompt"), Segment(SPLIT, len(PAIR), "answer", output=True)),
)


def by_node(model):
    forest = yx.Forest.of(ROWS)
    values = node_log_probs(model, forest)
    return np.concatenate([values[path[1:]] for path in forest.paths])


def by_path(model):
    return torch.cat([reference.log_probs(model, s.ids) for s in ROWS])


def of_targets(model):
    each = [reference.log_probs(model, s.ids)[s.weights[1:] > 0] for s in ROWS]
    return torch.cat(each)


def scored(model):
    (s,) = score_sequences(model, [PAIR])
    return s.log_p_xy, s.log_p_x, s.log_p_y_given_x


def balanced(model):
    ledger = yx.ledger(model, PAIR)
    return ledger.joint, ledger.marginal, ledger.conditional, ledger.conditional_by_difference


def sums(model):
    return reference.score(model, PAIR.ids[:SPLIT].tolist(), PAIR.ids[SPLIT:].tolist())


def head(function):
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=rng) for n in (9, VOCAB))
    rows, targets = torch.arange(9).repeat(2), torch.arange(18) * 5
    log_p, value = function(hidden, weight, rows, targets, torch.linspace(-1, 2, 18))
    return [*log_p.tolist(), float(value)]


# What equals which function of the reference, and how nearly; the encoder is above.
EQUAL = {
    "loss": (lambda m: yx.loss(m, ROWS).value, lambda m: reference.loss(m, ROWS)),
    "loss by prefix": (lambda m: yx.loss(m, ROWS).value, lambda m: reference.forest_loss(m, ROWS)),
    "log p of targets": (lambda m: yx.log_probs(m, yx.Targets.of(ROWS)).log_p, of_targets),
    "log p of nodes": (by_node, by_path),
    "score": (scored, lambda m: sums(m)[:3]),
    "ledger": (balanced, sums),
    "head": (lambda _: head(yx.selective_cross_entropy), lambda _: head(reference.selective_cross_entropy)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_the_fast_way_equals_the_reference(name):
    fast, slow = (torch.as_tensor(way(llama())).detach().double() for way in EQUAL[name])
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    ["encoder.encode", "forest", "objective", "targets", "head.selective", "head.passes", "scores.scoring",
     "scores.node_log_probs", "scores.ledger"],
)  # fmt: skip
def test_a_fast_module_says_what_it_equals(module):
    first = (import_module(f"ygivenx.{module}").__doc__ or "").splitlines()[:8]
    named = re.search(r"Equals `ygivenx\.reference\.(\w+)`(?P<how>.)", "\n".join(first))
    assert named
    assert callable(getattr(reference, named[1]))
    assert named["how"] in ",: ("
