"""The last layer for needed rows alone: the same hidden states there, the same gradients, and less work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import llama
from trees import tree

import ygivenx as yx
from ygivenx.models.model import hidden_states

ROWS = tree(3, count=12)


@pytest.fixture
def watched():
    """(model, forest, rows that each layer's MLP has met)."""
    model, met = llama(), []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _m, inputs: met.append(inputs[0].shape[1]))
    return model, yx.Forest.of(ROWS), met


def needed_of(forest, share):
    rng = np.random.default_rng(0)
    return np.flatnonzero(rng.random(len(forest.fed)) < share)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4])
def test_needed_rows_are_those_of_the_whole(share, chunk):
    model, forest = llama(), yx.Forest.of(ROWS)
    needed = needed_of(forest, share)
    direction = torch.randn(len(needed), 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for options in ({}, {"needed": needed, "chunk": chunk}):
        hidden = hidden_states(model, forest, **options)[torch.from_numpy(needed)]
        model.zero_grad()
        (hidden * direction).sum().backward()
        gradients.append((hidden.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (whole, wanted), (ours, made) = gradients
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)
    for name, gradient in wanted.items():
        if gradient is not None and gradient.norm():
            assert (made[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_other_rows_never_meet_its_mlp(watched):
    model, forest, met = watched
    hidden_states(model, forest, needed=needed_of(forest, 0.3))
    length = len(forest.fed)
    assert met == [length] * (len(met) - 1) + [len(needed_of(forest, 0.3))]
    assert 0 < met[-1] < length / 2


def test_the_loss_asks_for_its_trained_rows(watched):
    model, _, met = watched
    rng = np.random.default_rng(0)
    out = yx.loss(model, [(s.ids, s.weights * (rng.random(len(s)) < 0.2)) for s in ROWS])
    assert met[-1] == len(np.unique(out.edges.rows)) < met[0] / 2


def test_all_rows_and_nearly_all_go_the_plain_way(watched):
    model, forest, met = watched
    for needed in (None, np.arange(len(forest.fed)), np.arange(1, len(forest.fed))):
        met.clear()
        hidden_states(model, forest, needed=needed)
        assert set(met) == {len(forest.fed)}


def test_gradient_checkpointing_goes_the_plain_way(watched):
    """It runs the layer again after the forward pass, when no hook stands there any more."""
    model, forest, met = watched
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    hidden_states(model, forest, needed=needed_of(forest, 0.3)).sum().backward()
    assert set(met) == {len(forest.fed)}


def test_nothing_stays_behind(watched):
    model, forest, _ = watched
    last = model.model.layers[-1]

    def fail(_module, _inputs):
        raise RuntimeError("inside")

    hook = last.mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        hidden_states(model, forest, needed=needed_of(forest, 0.3))
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (last.mlp, last.self_attn.o_proj))
