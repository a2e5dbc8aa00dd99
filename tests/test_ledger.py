"""The ledger adds up to the joint; `check` tells possible from impossible."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import VOCAB, llama, sequences

from ygivenx import Sequence, check, ledger
from ygivenx.errors import ModelError
from ygivenx.sequence import Segment


def by_hand(model, ids) -> np.ndarray:
    """The slow twin: one forward pass, log_softmax in float64, token by token."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return np.array([math.nan, *(float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)))])


def test_rows_add_up_to_the_joint_and_agree_with_a_plain_forward_pass():
    model = llama(dtype=torch.float64)
    s = sequences(1, seed=3)[0]
    book = ledger(model, s)
    slow = by_hand(model, s.ids.tolist())
    np.testing.assert_allclose(book.log_p[0], slow, atol=1e-5)
    assert math.fsum(r.log_p for r in book.rows) == pytest.approx(book.joint, abs=1e-9)
    assert book.total.nats_per_token == pytest.approx(-book.joint / (len(s) - 1))
    assert book.marginal + book.conditional == pytest.approx(book.joint, abs=1e-9)
    assert book.conditional == pytest.approx(np.nansum(slow[s.output]), abs=1e-4)
    assert book.difference < 1e-4


def test_several_turns_by_both_routes():
    model = llama()
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCAB, 20)
    segments = (
        Segment(0, 5, "user"), Segment(5, 9, "answer", True), Segment(9, 14, "user"), Segment(14, 20, "answer", True),
    )  # fmt: skip
    weights = np.zeros(20, np.float32)
    weights[5:9] = weights[14:20] = 1
    book = ledger(model, Sequence(ids, weights, segments))
    assert book.balanced
    assert [r.kind for r in book.rows] == ["user", "answer"]
    assert [r.tokens for r in book.rows] == [10, 10]
    assert book.rows[1].share == pytest.approx(1)
    assert "=" in str(book)


def test_an_unbalanced_ledger_says_so():
    book = ledger(llama(), sequences(1)[0])
    assert book.balanced
    broken = type(book)(**{**book.__dict__, "conditional_by_difference": book.conditional + 0.1})
    assert not broken.balanced
    assert "≠" in str(broken)


def test_a_model_that_gives_nan_has_no_ledger():
    model = llama()
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="gives NaN"):
        ledger(model, sequences(1)[0])


@pytest.mark.parametrize(("at", "balanced"), [(-1, True), (3, False)])
def test_a_token_of_probability_zero(at, balanced):
    """In y both routes give −∞; in x a difference of two infinities is nothing."""
    model, s = llama(), sequences(1)[0]
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    model.lm_head.bias.data[s.ids[at]] = -math.inf
    book = ledger(model, s)
    assert book.joint == -math.inf
    assert book.balanced == balanced
    assert any("probability 0" in n for n in book.notes)


def test_the_impossible_case_of_the_seed():
    verdict = check(-3.5, -5.2)
    assert not verdict
    assert verdict.conditional == pytest.approx(1.7)
    assert "can't be more probable than x" in str(verdict)


def test_the_normal_case():
    verdict = check(-211.0, -5.2)
    assert verdict
    assert "normal case" in str(verdict)


@pytest.mark.parametrize(
    ("joint", "marginal", "possible"),
    [
        (-5.2, -5.2, True),
        (-5.2, -5.2 - 1e-9, False),
        (0.5, -1.0, False),
        (-1.0, 0.5, False),
        (math.nan, -1.0, False),
        (-math.inf, -1.0, True),
        (-math.inf, -math.inf, True),
    ],
)
def test_check(joint, marginal, possible):
    assert bool(check(joint, marginal)) is possible


def test_check_has_a_tolerance():
    assert check(-5.2, -5.2 - 1e-9, tolerance=1e-6)


@pytest.mark.full
@pytest.mark.model
def test_identity_on_the_real_model(smol):
    from ygivenx import Encoder

    model, tokenizer = smol
    texts = {
        "system": "Be brief.",
        "user": "Name three rivers.",
        "assistant": "The Nile, the Rhine, the Amazon.",
    }
    row = {"messages": [{"role": role, "content": text} for role, text in texts.items()]}
    book = ledger(model, Encoder(tokenizer)(row))
    assert book.balanced
    assert book.difference < 2e-4
    assert {r.kind for r in book.rows} == {"system", "template", "user", "answer", "end_of_turn"}
