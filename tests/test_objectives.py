"""Objectives as functions of plain tensors: which arguments are constants, and what float32 must not lose."""

from __future__ import annotations

import math

import pytest
import torch

import ygivenx as yx
from ygivenx import objectives
from ygivenx.errors import RowError
from ygivenx.targets import LogProbs, Targets


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


def policy(*values: float) -> LogProbs:
    """Log-probabilities of two sequences, of one and two targets."""
    rows = [yx.Sequence([1, 2], [0, 1]), yx.Sequence([1, 3, 4], [0, 1, 1])]
    return LogProbs(leaf(*values), Targets.of(rows))


GOOD = torch.tensor([True, False])
CONSTANTS = {
    "a reward": (lambda log_p, c: objectives.reward_weighted(log_p, c), (-1.0, -2.0)),
    "KTO's KL": (lambda log_p, c: objectives.kto(log_p, torch.zeros(2), GOOD, c.mean()), (-1.0, -2.0)),
    "the reference of a KL": (lambda log_p, c: objectives.kl_estimate(log_p, c), (-1.0, -2.0)),
    "a teacher": (lambda log_p, c: objectives.cross_entropy_to_teacher(log_p[None], c[None]), (-1.0, -2.0)),
    "a teacher of the reverse KL": (
        lambda log_p, c: objectives.reverse_kl_to_teacher(log_p[None], c[None]), (-1.0, -2.0)
    ),
    "who sampled": (
        lambda log_p, c: objectives.policy_gradient(
            LogProbs(torch.cat([log_p, log_p[:1]]), policy(0.0, 0.0, 0.0).targets), torch.ones(2), torch.cat([c, c[:1]])
        ),
        (-1.0, -2.0),
    ),
    "an advantage": (
        lambda log_p, c: objectives.policy_gradient(
            LogProbs(torch.cat([log_p, log_p[:1]]), policy(0.0, 0.0, 0.0).targets), c
        ),
        (1.0, -2.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_gets_no_gradient(name):
    of, values = CONSTANTS[name]
    log_p, constant = leaf(-1.5, -0.5), leaf(*values)
    of(log_p, constant).sum().backward()
    assert log_p.grad.abs().sum() > 0
    assert constant.grad is None


def test_estimates_are_constants():
    log_p = leaf(-1.0, -2.0)
    assert not objectives.kto_kl(log_p, torch.tensor([-3.0, -3.0])).requires_grad
    assert not objectives.on_policy_advantages(log_p, torch.zeros(2)).requires_grad


def test_ktos_kl_is_never_negative():
    assert objectives.kto_kl(torch.tensor([-3.0, -1.0]), torch.tensor([-1.0, -2.0])).item() == 0
    assert objectives.kto_kl(torch.tensor([-1.0]), torch.tensor([-2.0])).item() == 1


def test_the_odds_of_what_is_nearly_certain():
    chosen, rejected = -1e-9, -2.0  # exp(chosen) is 1 in float32
    odds = chosen - rejected - (math.log(-math.expm1(chosen)) - math.log(-math.expm1(rejected)))
    expected = -chosen + 0.1 * math.log1p(math.exp(-odds))
    found = objectives.orpo(torch.tensor([chosen]), torch.tensor([rejected]))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_pairs_whose_order_may_be_wrong():
    chosen, rejected, none = torch.tensor([-1.0]), torch.tensor([-3.0]), torch.zeros(1)
    right = objectives.dpo(chosen, rejected, none, none, beta=0.5).item()
    wrong = objectives.dpo(rejected, chosen, none, none, beta=0.5).item()
    mixed = objectives.dpo(chosen, rejected, none, none, beta=0.5, label_smoothing=0.2).item()
    assert mixed == pytest.approx(0.8 * right + 0.2 * wrong)
    assert objectives.ipo(chosen, rejected, none, none, beta=0.25).item() == pytest.approx((2 - 2) ** 2)
    assert objectives.simpo(chosen, rejected, beta=0.5, gamma=1.0).item() == pytest.approx(math.log(2))


def test_the_shares_of_few_tokens_are_renormalised():
    p, q = torch.tensor([[0.2, 0.1]]), torch.tensor([[0.3, 0.1]])
    assert objectives.cross_entropy_to_teacher(p.log(), q.log()).item() == pytest.approx(
        -(0.75 * math.log(0.2) + 0.25 * math.log(0.1))
    )
    assert objectives.reverse_kl_to_teacher(p.log(), q.log()).item() == pytest.approx(
        2 / 3 * math.log((2 / 3) / 0.75) + 1 / 3 * math.log((1 / 3) / 0.25)
    )


def test_a_kl_in_samples_of_an_older_policy():
    now, old, reference = (
        policy(-1.0, -1.0, -2.0),
        torch.tensor([-2.0, -1.0, -2.0]),
        torch.tensor([-3.0, -1.0, -2.0]),
    )
    of = {"old_log_p": old, "reference_log_p": reference, "kl_weight": 1.0, "mean": "token"}
    kl = math.expm1(-2.0) + 2.0
    for times, factor in ((False, 1.0), (True, math.e)):
        found = objectives.policy_gradient(now, torch.zeros(2), **of, kl_times_ratio=times)
        assert found.item() == pytest.approx(kl * factor / 3, rel=1e-5)


def test_sums_with_weights_and_targets_that_have_none():
    rows = [yx.Sequence([1, 2, 3], [0, 0.5, 2.0])]
    found = LogProbs(torch.tensor([-1.0, -3.0]), Targets.of(rows))
    assert (found.sums().item(), found.sums(weighted=True).item()) == (-4.0, -6.5)
    assert found.targets.weight.tolist() == [0.5, 2.0]
    with pytest.raises(RowError, match="none of its 2 tokens is a target"):
        Targets.of([*rows, yx.Sequence([1, 2], [0, 0])])
    assert Targets.of(rows, which="all").position.tolist() == [1, 2]
