"""`yx.log_probs` over one forest equals each sequence by itself in float64, and so does every objective made of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import VOCAB, llama
from torch import Tensor
from torch.nn.functional import logsigmoid
from trees import gradients, tree

from ygivenx import objectives
from ygivenx.errors import ConfigError, ModelError, RowError
from ygivenx.head.reweight import dft_weights, excess_weights, focal
from ygivenx.sequence import Segment, Sequence
from ygivenx.targets import LogProbs, Targets, log_probs


def groups(prompts: int = 3, replies: int = 4, seed: int = 0) -> list[Sequence]:
    """Replies to shared prompts, of which some begin alike, and one is the beginning of another."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(prompts):
        x = rng.integers(0, VOCAB, int(rng.integers(5, 20)))
        ys = [rng.integers(0, VOCAB, int(rng.integers(2, 9))) for _ in range(replies)]
        ys[1] = np.concatenate((ys[0], ys[1]))
        ys[2][:2] = ys[3][:2]
        out += [Sequence(np.concatenate((x, y)), np.repeat([0.0, 1.0], [len(x), len(y)])) for y in ys]
    return out


class Slow:
    """Every sequence alone, every logit, float64."""

    def __init__(self, model: torch.nn.Module, rows: list[Sequence]) -> None:
        self.tokens, self.distributions = [], []
        for s in rows:
            ids = torch.tensor(s.ids)
            every = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            trained = torch.tensor(s.weights[1:]) != 0
            self.tokens.append(every.gather(1, ids[1:, None])[:, 0][trained])
            self.distributions.append(every[trained])

    def sums(self) -> Tensor:
        return torch.stack([t.sum() for t in self.tokens])

    def means(self) -> Tensor:
        return torch.stack([t.mean() for t in self.tokens])


@pytest.fixture
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights in float32 and in float64."""
    return llama(seed=3), llama(seed=3, dtype=torch.float64)


def test_values_of_every_target_and_of_its_distribution(models):
    ours, exact = models
    rows = groups()
    got = log_probs(ours, rows, entropy=True, ranks=True, top_k=VOCAB)
    slow = Slow(exact, rows)
    assert torch.allclose(got.log_p.double(), torch.cat(slow.tokens), atol=1e-5)
    assert torch.allclose(got.sums().double(), slow.sums(), atol=1e-4)
    assert torch.allclose(got.of(5).double(), slow.tokens[5], atol=1e-5)
    every = torch.cat(slow.distributions)
    assert torch.allclose(got.entropy.double(), -(every.exp() * every).sum(1), atol=1e-5)
    ids = torch.tensor(np.concatenate([s.ids[s.weights > 0] for s in rows]))
    assert got.rank.tolist() == (every > every.gather(1, ids[:, None])).sum(1).tolist()
    whole = torch.empty_like(every).scatter(1, got.top_ids, got.top_log_p.double())
    assert torch.allclose(whole, every, atol=1e-5)


def test_candidates_are_differentiable_beside_the_targets(models):
    ours, exact = models
    rows = groups(2)
    slow = torch.cat(Slow(exact, rows).distributions)
    ids = torch.randint(VOCAB, (len(slow), 5), generator=torch.Generator().manual_seed(0))
    got = log_probs(ours, rows, candidates=ids)
    assert torch.allclose(got.candidates.double(), slow.gather(1, ids), atol=1e-5)
    assert_gradients(ours, (got.candidates**2).sum(), exact, (slow.gather(1, ids) ** 2).sum())


@pytest.mark.parametrize("chunk", [None, 9])
def test_random_forests_also_in_chunks(models, chunk):
    ours, exact = models
    rows = [s for s in tree(seed=5) if s.weights.any()]
    got, slow = log_probs(ours, rows, chunk=chunk), Slow(exact, rows)
    assert torch.allclose(got.sums().double(), slow.sums(), atol=1e-4)
    assert_gradients(ours, (got.sums() * got.means()).sum(), exact, (slow.sums() * slow.means()).sum())


def test_what_one_sequence_trains_is_context_in_another(models):
    """Turn 1 is trained in the first sequence only: merged weights would count it for both."""
    ids = np.arange(12)
    first = Sequence(ids[:8], np.repeat([0.0, 1.0], [4, 4]))
    second = Sequence(ids, np.repeat([0.0, 0.5], [10, 2]))
    got = log_probs(models[0], [first, second])
    assert got.lengths.tolist() == [4, 2]
    assert torch.allclose(got.sums(weighted=True)[1], 0.5 * got.of(1).sum())


def test_which_tokens_are_targets():
    segments = (Segment(0, 3, "prompt"), Segment(3, 6, "answer", output=True))
    s = Sequence(np.arange(6), [0, 0, 0, 0, 1, 1], segments)
    assert {w: Targets.of([s], w).position.tolist() for w in ("weighted", "reply", "all")} == {
        "weighted": [4, 5],
        "reply": [3, 4, 5],
        "all": [1, 2, 3, 4, 5],
    }
    with pytest.raises(RowError, match="sequence 1"):
        Targets.of([s, Sequence(np.arange(3), np.zeros(3))])


def test_a_lora_base_is_the_reference_without_a_copy():
    peft = pytest.importorskip("peft")
    base = llama(seed=1)
    with torch.no_grad():
        before = log_probs(base, groups(1)).sums()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.allclose(log_probs(model, groups(1)).sums(), before, atol=1e-2)
    assert torch.equal(log_probs(model, groups(1), adapters=False).sums(), before)
    with pytest.raises(ModelError, match="no adapters"):
        log_probs(llama(), groups(1), adapters=False)


# -- objectives: (ours from LogProbs and reference LogProbs, the formula spelled out over the slow twin) ------------


def pairs(sums: Tensor) -> tuple[Tensor, Tensor]:
    return sums[0::2], sums[1::2]


def pairwise(name: str, of: str, **options) -> Callable[[LogProbs, LogProbs], Tensor]:
    def value(policy: LogProbs, reference: LogProbs) -> Tensor:
        sides = [getattr(p, of)() for p in (policy, reference)]
        given = [side for v in sides[: 1 if name in ("orpo", "simpo") else 2] for side in pairs(v)]
        return getattr(objectives, name)(*given, **options).mean()

    return value


def margin(p: Slow, r: Slow, of: str = "sums") -> Tensor:
    gain = getattr(p, of)() - getattr(r, of)()
    return gain[0::2] - gain[1::2]


DESIRABLE = torch.tensor([True, False, True, True] * 3)
REWARDS = torch.linspace(-1, 2, 12) ** 2
OLD = 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(1))


def policy_gradient(**options) -> Callable[[LogProbs, LogProbs], Tensor]:
    def value(policy: LogProbs, reference: LogProbs) -> Tensor:
        old = (policy.log_p + OLD[: len(policy.log_p)]).detach()
        advantages = objectives.group_advantages(REWARDS, 4)
        return objectives.policy_gradient(
            policy, advantages, old, reference_log_p=reference.log_p, kl_weight=0.05, **options
        )

    return value


def slow_policy_gradient(
    p: Slow, r: Slow, level: str, mean: str, clip: tuple[float, float] = (0.2, 0.2)
) -> Tensor:
    by_prompt = REWARDS.double().view(3, 4)
    advantages = ((by_prompt - by_prompt.mean(1)[:, None]) / (by_prompt.std(1)[:, None] + 1e-4)).flatten()
    old = OLD.double().split([*(n := [len(t) for t in p.tokens]), len(OLD) - sum(n)])
    terms = []
    for t, ref, o, a in zip(p.tokens, r.tokens, old[:-1], advantages, strict=True):
        log_ratio = t - (t + o).detach()
        if level == "sequence":
            log_ratio = log_ratio.mean().expand(len(t))
        ratio = log_ratio.exp()
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip[0], 1 + clip[1]) * a)
        terms.append(-surrogate + 0.05 * ((ref - t).exp() - (ref - t) - 1))
    return torch.cat(terms).mean() if mean == "token" else torch.stack([t.mean() for t in terms]).mean()


def rho(tokens: Tensor, reference: Tensor, keep: float) -> Tensor:
    """−Σ log p over the tokens whose loss exceeds the reference's the most."""
    excess = (reference - tokens).detach()
    return -tokens[excess.topk(round(keep * len(tokens))).indices].sum()


OBJECTIVES: dict[str, tuple[Callable[[LogProbs, LogProbs], Tensor], Callable[[Slow, Slow], Tensor]]] = {
    "dpo": (pairwise("dpo", "sums", beta=0.3), lambda p, r: -logsigmoid(0.3 * margin(p, r)).mean()),
    "cdpo": (
        pairwise("dpo", "sums", beta=0.3, label_smoothing=0.1),
        lambda p, r: -(0.9 * logsigmoid(0.3 * margin(p, r)) + 0.1 * logsigmoid(-0.3 * margin(p, r))).mean(),
    ),
    "ipo": (pairwise("ipo", "sums"), lambda p, r: ((margin(p, r) - 5) ** 2).mean()),
    "ipo of means": (pairwise("ipo", "means"), lambda p, r: ((margin(p, r, "means") - 5) ** 2).mean()),
    "orpo": (
        pairwise("orpo", "means", beta=0.2),
        lambda p, r: (
            -p.means()[0::2]
            - 0.2 * logsigmoid(torch.logit(p.means().exp())[0::2] - torch.logit(p.means().exp())[1::2])
        ).mean(),
    ),
    "simpo": (
        pairwise("simpo", "means", beta=2.5, gamma=0.7),
        lambda p, r: -logsigmoid(2.5 * (p.means()[0::2] - p.means()[1::2]) - 0.7).mean(),
    ),
    "kto": (
        lambda p, r: objectives.kto(p.sums(), r.sums(), DESIRABLE, 0.4, undesirable_weight=1.5).mean(),
        lambda p, r: torch.where(
            DESIRABLE,
            1 - torch.sigmoid(0.1 * (p.sums() - r.sums() - 0.4)),
            1.5 * (1 - torch.sigmoid(0.1 * (0.4 - p.sums() + r.sums()))),
        ).mean(),
    ),
    "reward weighted": (
        lambda p, r: objectives.reward_weighted(p.sums(), REWARDS - 1).mean(),
        lambda p, r: -((REWARDS.double() - 1) * p.sums()).mean(),
    ),
    "rloo": (
        lambda p, r: objectives.reward_weighted(
            p.sums(), objectives.group_advantages(REWARDS, 4, kind="rloo")
        ).mean(),
        lambda p, r: (
            -torch.stack(
                [
                    (REWARDS[i].double() - (REWARDS[i // 4 * 4 :][:4].double().sum() - REWARDS[i]) / 3)
                    * t.sum()
                    for i, t in enumerate(p.tokens)
                ]
            ).mean()
        ),
    ),
    "dr_grpo": (
        lambda p, r: objectives.policy_gradient(
            p, objectives.group_advantages(REWARDS, 4, kind="dr_grpo"), mean=12 * 9.0
        ),
        lambda p, r: (
            -sum(
                (REWARDS[i].double() - REWARDS[i // 4 * 4 :][:4].double().mean())
                * (t - t.detach()).exp().sum()
                for i, t in enumerate(p.tokens)
            )
            / (12 * 9.0)
        ),
    ),
    "on-policy distillation": (
        lambda p, r: objectives.policy_gradient(
            p, objectives.on_policy_advantages(p.log_p, r.log_p), mean="token"
        ),
        lambda p, r: (
            -torch.cat(
                [(s - t).detach() * (t - t.detach()).exp() for t, s in zip(p.tokens, r.tokens, strict=True)]
            ).mean()
        ),
    ),
    "focal": (
        lambda p, r: focal(p.log_p, p.weight, gamma=2.0),
        lambda p, r: -sum(((1 - t.exp()) ** 2 * t).sum() for t in p.tokens),
    ),
    "dft": (
        lambda p, r: -(dft_weights(p.log_p, p.weight) * p.log_p).sum(),
        lambda p, r: -sum((t.exp().detach() * t).sum() for t in p.tokens),
    ),
    "rho-1": (
        lambda p, r: -(excess_weights(p.log_p.detach(), r.log_p, p.weight, share=0.6) * p.log_p).sum(),
        lambda p, r: rho(torch.cat(p.tokens), torch.cat(r.tokens), 0.6),
    ),
    "grpo": (policy_gradient(), lambda p, r: slow_policy_gradient(p, r, "token", "sequence")),
    "dapo": (
        policy_gradient(mean="token", clip=(0.2, 0.28)),
        lambda p, r: slow_policy_gradient(p, r, "token", "token", (0.2, 0.28)),
    ),
    "gspo": (
        policy_gradient(level="sequence", clip=(0.05, 0.05)),
        lambda p, r: slow_policy_gradient(p, r, "sequence", "sequence", (0.05, 0.05)),
    ),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_equals_its_formula_over_sequences_by_themselves(models, name, seed):
    ours, exact = models
    ours_of, exact_of = OBJECTIVES[name]
    rows = groups(seed=seed)
    targets = Targets.of(rows)
    with torch.no_grad():
        reference = log_probs(llama(seed=9), targets)
        slow_reference = Slow(llama(seed=9, dtype=torch.float64), rows)
    value = ours_of(log_probs(ours, targets), reference)
    slow = exact_of(Slow(exact, rows), slow_reference)
    assert value.item() == pytest.approx(slow.item(), rel=1e-5, abs=1e-6)  # some are sums around 0
    assert_gradients(ours, value, exact, slow)


def assert_gradients(ours, value: Tensor, exact, slow: Tensor, tolerance: float = 1e-5) -> None:
    a, b = gradients(ours, value), gradients(exact, slow)
    assert a.keys() == b.keys()
    # The worst tensor of float32 runs of one and the same graph lies at a few 1e-6.
    assert max(float((a[n].double() - g).norm() / g.norm()) for n, g in b.items()) < tolerance


@pytest.mark.full
def test_gradients_of_dpo_on_a_real_model_are_those_of_each_reply_by_itself(smol):
    """Pairs with prompts of 400 tokens; by themselves through the model's own forward pass. The bar is 3e-5."""
    model, _ = smol
    rng = np.random.default_rng(0)
    rows = []
    for lengths in ((60, 40), (25, 70)):
        x = rng.integers(1000, 40_000, 400)
        rows += [
            Sequence(np.concatenate((x, rng.integers(1000, 40_000, n))), np.repeat([0.0, 1.0], [400, n]))
            for n in lengths
        ]
    reference = torch.tensor([-500.0, -330.0, -210.0, -590.0])

    def loss(sums: Tensor) -> Tensor:
        return objectives.dpo(sums[0::2], sums[1::2], reference[0::2], reference[1::2], beta=0.05).mean()

    assert Targets.of(rows).forest.total > 1.5 * len(Targets.of(rows).forest)
    shared = loss(log_probs(model, rows).sums())
    alone = loss(torch.stack([sum_of(model, s) for s in rows]))
    assert shared.item() == pytest.approx(alone.item(), rel=1e-5)
    ours, theirs = gradients(model, shared), gradients(model, alone)
    assert max(float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items()) < 3e-5


def sum_of(model: torch.nn.Module, s: Sequence) -> Tensor:
    ids = torch.tensor(s.ids)
    every = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return every.gather(1, ids[1:, None])[torch.tensor(s.weights[1:]) > 0].sum()


def test_advantages_of_groups():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert objectives.group_advantages(rewards, 2, kind="dr_grpo").tolist() == [0.5, -0.5, -0.5, 0.5]
    for given in (rewards, rewards.long()):
        assert objectives.group_advantages(given, 2, kind="rloo").tolist() == [1, -1, -1, 1]
    for group in (1, 3):
        with pytest.raises(ConfigError, match="groups of"):
            objectives.group_advantages(rewards, group)


def test_distillation_from_a_teacher(models):
    student, teacher = models[0], llama(seed=9)
    targets = Targets.of(groups(2))
    with torch.no_grad():
        full = log_probs(teacher, targets, top_k=VOCAB)
    got = log_probs(student, targets, candidates=full.top_ids)
    p, q = (
        torch.cat(Slow(llama(seed=s, dtype=torch.float64), groups(2)).distributions).detach() for s in (3, 9)
    )
    forward = objectives.cross_entropy_to_teacher(got.candidates, full.top_log_p)
    assert torch.allclose(forward.double(), -(q.exp() * p).sum(1), atol=1e-4)
    reverse = objectives.reverse_kl_to_teacher(got.candidates, full.top_log_p)
    assert torch.allclose(reverse.double(), (p.exp() * (p - q)).sum(1), atol=1e-4)
    for name, of in (
        ("cross_entropy_to_teacher", lambda p: -(q.exp() * p).sum(1)),
        ("reverse_kl_to_teacher", lambda p: (p.exp() * (p - q)).sum(1)),
    ):
        again = log_probs(student, targets, candidates=full.top_ids)
        value = getattr(objectives, name)(again.candidates, full.top_log_p).mean()
        exact = of(torch.cat(Slow(models[1], groups(2)).distributions)).mean()
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        assert_gradients(student, value, models[1], exact)
    on_policy = objectives.on_policy_advantages(got.log_p, full.log_p)
    assert not on_policy.requires_grad
    assert torch.allclose(on_policy, full.log_p - got.log_p)


def test_a_kl_weight_needs_a_reference(models):
    policy = log_probs(models[0], groups(1))
    with pytest.raises(ConfigError, match="reference_log_p"):
        objectives.policy_gradient(policy, torch.ones(4), kl_weight=0.1)
