"""Reweighting losses against float64 twins on whole logits."""

from __future__ import annotations

import pytest
import torch

from ygivenx.errors import ConfigError
from ygivenx.head.reweight import dft_weights, excess_weights, focal, mean_log_probs, smoothed
from ygivenx.head.selective import log_probs, selective_cross_entropy
from ygivenx.reference import all_logits


@pytest.fixture
def head():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(200, 16, requires_grad=True)
    bias = torch.randn(200, requires_grad=True)
    return (
        hidden,
        weight,
        bias,
        torch.tensor([0, 3, 3, 8]),
        torch.tensor([5, 5, 199, 0]),
        torch.tensor([1, 0.5, 2, 1]),
    )


def twin_log_softmax(hidden, weight, bias, rows):
    return torch.log_softmax(all_logits(hidden, weight, bias=bias, scale=0.5), -1)[rows]


def same_gradients(loss, true, tensors):
    torch.testing.assert_close(loss.double(), true, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(true, tensors), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_dft(head):
    hidden, weight, bias, rows, targets, weights = head
    with torch.no_grad():
        log_p = log_probs(hidden, weight, rows, targets, bias=bias, scale=0.5)
    _, loss = selective_cross_entropy(
        hidden, weight, rows, targets, dft_weights(log_p, weights), bias=bias, scale=0.5
    )
    true = twin_log_softmax(hidden, weight, bias, rows).gather(1, targets[:, None])[:, 0]
    same_gradients(loss, -(weights * true.detach().exp() * true).sum(), (hidden, weight, bias))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal(head, gamma):
    hidden, weight, bias, rows, targets, weights = head
    log_p = log_probs(hidden, weight, rows, targets, bias=bias, scale=0.5)
    true = twin_log_softmax(hidden, weight, bias, rows).gather(1, targets[:, None])[:, 0]
    same_gradients(
        focal(log_p, weights, gamma=gamma),
        -(weights * (1 - true.exp()) ** gamma * true).sum(),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize(("gamma", "slope"), [(0.0, -1.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0)])
def test_focal_of_a_certain_token_is_zero_and_flat(gamma, slope):
    log_p = torch.zeros(1, requires_grad=True)
    loss = focal(log_p, torch.ones(1), gamma=gamma)
    loss.backward()
    assert loss.item() == 0
    assert log_p.grad is not None
    assert log_p.grad.item() == slope


def test_the_mean_takes_the_indices_that_log_probs_takes(head):
    hidden, weight, _, rows, targets, _ = head
    log_p = log_probs(hidden, weight, rows, targets)
    told = [
        mean_log_probs(hidden, weight, rows.to(d), targets.to(d), log_p) for d in (torch.int64, torch.int16)
    ]
    assert torch.equal(*told)


def test_label_smoothing(head):
    hidden, weight, bias, rows, targets, weights = head
    log_p = log_probs(hidden, weight, rows, targets, bias=bias, scale=0.5)
    mean = mean_log_probs(hidden, weight, rows, targets, log_p, bias=bias, scale=0.5)
    true = twin_log_softmax(hidden, weight, bias, rows)
    on_target = true.gather(1, targets[:, None])[:, 0]
    same_gradients(
        smoothed(log_p, mean, weights, smoothing=0.2),
        -(weights * (0.8 * on_target + 0.2 * true.mean(-1))).sum(),
        (hidden, weight, bias),
    )


def test_excess_keeps_the_trained_tokens_that_lag_behind_the_reference():
    log_p = torch.tensor([-1.0, -5.0, -2.0, -3.0, -9.0])
    reference = torch.tensor([-1.0, -1.0, -4.0, -1.0, 0.0])  # excess 0, 4, -2, 2, 9
    weights = torch.tensor([1.0, 2.0, 1.0, 0.5, 0.0])  # the last isn't trained
    assert excess_weights(log_p, reference, weights, share=0.5).tolist() == [0, 2, 0, 0.5, 0]
    assert excess_weights(log_p, reference, weights, share=0.01).tolist() == [0, 2, 0, 0, 0]
    assert excess_weights(log_p, reference, weights, share=1.0).tolist() == weights.tolist()
    assert excess_weights(log_p, reference, 0 * weights).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, w: focal(p, w, gamma=-1), "gamma"),
        (lambda p, w: excess_weights(p, p, w, share=0), "share"),
        (lambda p, w: excess_weights(p, p, w, share=1.1), "share"),
        (lambda p, w: smoothed(p, p, w, smoothing=1.0), "smoothing"),
    ],
)
def test_impossible_settings_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call(torch.zeros(2), torch.ones(2))
