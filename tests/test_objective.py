"""yx.loss: only y counts. Targets in x can't move it by one bit, and its gradient at x's logits is zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import VOCAB, llama, sequences
from trees import tree

import ygivenx as yx
from ygivenx.errors import LossError
from ygivenx.sequence import Sequence


def test_value_and_gradient_equal_the_reference():
    data = sequences(6, seed=1)
    fast, slow = llama(), llama()
    out = yx.loss(fast, data)
    out.value.backward()
    expected = yx.reference.loss(slow, data)
    expected.backward()
    assert out.value.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name


@pytest.mark.parametrize(
    "options", [{}, {"chunk": 16}, {"route": "unshared"}, {"route": "unshared", "chunk": 16}]
)
def test_log_p_stands_in_the_order_of_the_edges(options):
    model, rows = llama(), tree(seed=6)
    out, expected = yx.loss(model, rows, **options), []
    for node in out.edges.nodes.tolist():
        path = [node]
        while out.forest.parent[path[-1]] >= 0:
            path.append(int(out.forest.parent[path[-1]]))
        expected.append(yx.reference.log_probs(model, out.forest.token[path[::-1]])[-1].item())
    assert out.log_p.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_last_token_of_x_as_a_target_has_no_part():
    """Same weights, other *targets* in x at positions that nothing reads: not one bit changes."""
    model, s = llama(), sequences(1, seed=8)[0]
    out = yx.loss(model, s)
    trained = np.flatnonzero(s.weights)
    assert set(out.edges.targets.tolist()) == set(s.ids[trained].tolist())
    assert len(out.edges.rows) == len(trained)


def test_float_weights_and_denominator():
    s = sequences(1, seed=4)[0]
    half = Sequence(s.ids, s.weights * 0.5, s.segments)
    model = llama()
    assert yx.loss(model, half).value.item() == pytest.approx(yx.loss(model, s).value.item(), rel=1e-6)
    assert yx.loss(model, half).weight_sum == pytest.approx(s.weights.sum() / 2)
    assert yx.loss(model, s, denominator=1.0).value.item() == pytest.approx(
        yx.loss(model, s).value.item() * float(s.weights.sum()), rel=1e-6
    )


def test_no_weight_is_an_error_not_a_zero():
    silent = Sequence(np.arange(5), np.zeros(5, np.float32))
    with pytest.raises(LossError, match="no token of this batch has a weight"):
        yx.loss(llama(), silent)
    assert yx.loss(llama(), silent, denominator=3.0).value.item() == 0


def test_a_batch_without_weight_still_has_a_graph():
    """One rank may have nothing to train while the others do: its backward must run, and give zeros."""
    model = llama()
    yx.loss(model, Sequence(np.arange(5), np.zeros(5, np.float32)), denominator=3.0).value.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.model
def test_x_contributes_exactly_zero_on_the_real_model(smol):
    """The gradient at the head's input is exactly zero at every position that predicts a token of x."""
    model, tokenizer = smol
    row = {
        "messages": [
            {"role": "user", "content": "What is 2+2?"},
            {"role": "assistant", "content": "It is 4."},
        ]
    }
    example = yx.Encoder(tokenizer)(row)
    from ygivenx.head.selective import selective_cross_entropy
    from ygivenx.models.model import head_of, hidden_states

    forest = yx.Forest.of([example.only])
    edges = forest.edges()
    hidden = hidden_states(model, forest).detach().requires_grad_()
    rows, targets, weights = (
        torch.from_numpy(np.array(a)) for a in (edges.rows, edges.targets, edges.weights)
    )
    _, loss = selective_cross_entropy(hidden, head_of(model).weight, rows, targets, weights)
    loss.backward()
    norms = hidden.grad.norm(dim=1)
    predicts_y = np.zeros(len(norms), bool)
    predicts_y[np.flatnonzero(example.weights) - 1] = True
    assert (norms[torch.from_numpy(~predicts_y)] == 0).all()
    assert (norms[torch.from_numpy(predicts_y)] > 0).all()
    model.zero_grad()


@pytest.mark.model
def test_targets_in_x_are_not_read_on_the_real_model(smol):
    """The last token of an x that ends a sequence is only ever a target; replace it, and no bit of y moves."""
    model, tokenizer = smol
    ids = np.array(tokenizer("The capital of France is Paris and the river is the Seine")["input_ids"])
    weights = np.zeros(len(ids), np.float32)
    weights[4:7] = 1  # y ends before the text does: what follows is x for nobody
    with torch.no_grad():
        before = yx.loss(model, Sequence(ids, weights)).value
        changed = ids.copy()
        changed[7:] = np.random.default_rng(0).integers(10, 1000, len(ids) - 7)
        after = yx.loss(model, Sequence(changed, weights)).value
    assert torch.equal(before, after)


def test_vocabulary_is_what_the_head_has():
    assert llama().lm_head.weight.shape[0] == VOCAB


def test_the_denominator_is_summed_in_float64():
    """2²⁵ + 3 ones: in float32 each 1 would be rounded away."""
    s = Sequence(np.arange(1, 6), np.array([0, 2**25, 1, 1, 1], np.float32))
    assert yx.loss(llama(), s).weight_sum == 2**25 + 3


@pytest.mark.parametrize("batch", [{"messages": []}, "text", 5])
def test_what_isnt_encoded_is_no_batch(batch):
    with pytest.raises(LossError, match="is no batch"):
        yx.loss(llama(), batch)
