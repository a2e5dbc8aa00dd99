"""`yx.PreferenceTrainer`: gradients of the papers' formulas row by row, a reference computed once, resumed runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import VOCAB, llama, sequences
from torch.nn.functional import logsigmoid
from transformers import TrainingArguments
from trees import distances, gradients

import ygivenx as yx
from ygivenx import Example, RatedExample, Sequence
from ygivenx.errors import CheckpointError, ConfigError, LossError
from ygivenx.sequence import Logged
from ygivenx.training.rated import Objective, RatedPacks


def row(
    index: int, rewards: tuple[float, ...] = (1, -1), weight: float = 1.0, seed: int | None = None
) -> RatedExample:
    rng = np.random.default_rng(index if seed is None else seed)
    x = rng.integers(0, VOCAB, int(rng.integers(4, 12)))
    replies = []
    for n in rng.integers(2, 8, len(rewards)):
        ids = np.concatenate((x, rng.integers(0, VOCAB, n)))
        weights = np.concatenate((np.zeros(len(x)), rng.choice([0.5, 1.0], n) if index == 2 else np.ones(n)))
        replies.append(Example((Sequence(ids, weights),)))
    names = ("chosen", "rejected") if len(rewards) == 2 else tuple(f"reply {i}" for i in range(len(rewards)))
    return RatedExample(tuple(replies), rewards, weight, names, index=index)


def make(tmp_path, rows, model=None, **overrides):
    own = {
        k: overrides.pop(k)
        for k in ("max_tokens", "objective", "eval_dataset", "reference")
        if k in overrides
    }
    settings = {
        "output_dir": str(tmp_path),
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    args = TrainingArguments(
        **settings | {"max_steps": 1, "logging_steps": 1, "save_strategy": "no"} | overrides
    )
    return yx.PreferenceTrainer(model or llama(), args, rows, **{"max_tokens": 64} | own)


class Alone:
    """log Pr of each reply of each row under a float64 model, sequence by sequence, times the tokens' weights."""

    def __init__(self, rows: list[RatedExample], model: torch.nn.Module) -> None:
        self.rows, self.tokens = rows, [[self._tokens(model, r) for r in row.replies] for row in rows]

    def _tokens(self, model, reply):
        ids = torch.tensor(reply.ids)
        every = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        return every.gather(1, ids[1:, None])[torch.tensor(reply.weights[1:]) > 0, 0]

    def value(self, i: int, k: int, mean: bool = False) -> torch.Tensor:
        weights = torch.tensor(self.rows[i].replies[k].weights).double()
        weights = weights[weights > 0]
        total = (self.tokens[i][k] * weights).sum()
        return total / weights.sum() if mean else total


def expected(name: str, rows: list[RatedExample], p: Alone, r: Alone, kl: float = 0.0) -> torch.Tensor:
    """Σ of the rows' weighted losses, each the mean over its pairs or replies, by the formulas spelled out."""
    mean = name in ("ipo", "orpo", "simpo")

    def of_pair(i: int, a: int, b: int) -> torch.Tensor:
        pa, pb = p.value(i, a, mean), p.value(i, b, mean)
        margin = (pa - r.value(i, a, mean)) - (pb - r.value(i, b, mean))
        odds = torch.logit(pa.exp()) - torch.logit(pb.exp()) if name == "orpo" else margin
        return {
            "dpo": lambda: -logsigmoid(0.3 * margin),
            "ipo": lambda: (margin - 1 / 0.6) ** 2,
            "orpo": lambda: -pa - 0.3 * logsigmoid(odds),
            "simpo": lambda: -logsigmoid(0.3 * (pa - pb) - 1.0),
        }[name]()

    def of_reply(i: int, k: int) -> torch.Tensor:
        reward = rows[i].rewards[k]
        if name == "reward_weighted":
            return -reward * p.value(i, k)
        gain = 0.3 * (p.value(i, k) - r.value(i, k) - kl)
        return 1 - torch.sigmoid(gain if reward > 0 else -gain)

    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for i, row in enumerate(rows):
        if name in ("kto", "reward_weighted"):
            losses = [of_reply(i, k) for k in range(len(row.replies))]
        else:
            losses = [of_pair(i, a, b) for a, b in row.pairs]
        if losses:
            total, weights = total + row.weight * torch.stack(losses).mean(), weights + row.weight
    return total / weights


ROWS = [row(0), row(1, (0.5, 3, 0.5, -1)), row(2, weight=0.5), row(3, (1,)), row(4, (-1,))]


@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo", "reward_weighted"])
def test_a_steps_gradient_is_that_of_the_rows_by_themselves(tmp_path, name, accumulation):
    model, exact = llama(seed=3), llama(seed=3, dtype=torch.float64)
    reference = llama(seed=9)
    objective = {"name": name} | ({} if name == "reward_weighted" else {"beta": 0.3})
    trainer = make(
        tmp_path, ROWS, model, objective=objective, reference=reference, gradient_accumulation_steps=accumulation,
        max_tokens=10_000 if accumulation == 1 else 1, max_grad_norm=0.0,
    )  # fmt: skip
    ours = gradient(trainer)
    with torch.no_grad():
        r = Alone(ROWS, reference.double())
    value = expected(name, ROWS, Alone(ROWS, exact), r)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value.item(), rel=2e-5, abs=1e-4)
    assert max(distances(ours, gradients(exact, value))) < 1e-5


def sampled(index: int, x: np.ndarray, n: int, logged: bool, weight: float = 1.0) -> RatedExample:
    """A reply of n tokens with a reward; `logged`: with advantages of both signs and log-probabilities far from now."""
    rng = np.random.default_rng(index)
    ids = np.concatenate((x, rng.integers(0, VOCAB, n)))
    came = Logged()
    if logged:
        near = rng.normal(-np.log(VOCAB), 0.5, len(ids)).astype(np.float32)
        came = Logged(near, np.where(np.arange(len(ids)) < len(x), 0, rng.normal(size=len(ids))))
    sequence = Sequence(ids, (np.arange(len(ids)) >= len(x)).astype(np.float32), logged=came)
    reward = float(rng.normal())
    return RatedExample((Example((sequence,)),), (reward,), weight, ("reply",), index=index)


SAMPLED = [
    *(sampled(i, np.arange(3, 9), 4 + i, logged=True, weight=1 - 0.5 * (i == 2)) for i in range(4)),
    *(sampled(i, np.arange(20, 27), i - 1, logged=False) for i in range(4, 8)),
    sampled(9, np.arange(40, 45), 4, logged=False),  # alone with its prompt, and nothing logged: left out
]


@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.parametrize("name", ["grpo", "dapo", "rloo", "gspo"])
def test_logged_advantages_and_log_probabilities_reach_the_gradient(tmp_path, name, accumulation):
    """Those of token rows; where none were logged, advantages of the group of a prompt's replies, and a ratio of 1."""
    model, exact, reference = llama(seed=3), llama(seed=3, dtype=torch.float64), llama(seed=9)
    options = {"clip_low": 0.1, "clip_high": 0.3} if name != "gspo" else {"clip_low": 0.05, "clip_high": 0.1}
    trainer = make(
        tmp_path, SAMPLED, model, objective={"name": name, "kl": 0.2} | options, reference=reference,
        gradient_accumulation_steps=accumulation, max_tokens=10_000 if accumulation == 1 else 1, max_grad_norm=0.0,
    )  # fmt: skip
    assert str(trainer.train_dataset).count("left out") == str(trainer.train_dataset).count("ratio is 1") == 1
    ours, rows = gradient(trainer), SAMPLED[:-1]
    with torch.no_grad():
        r = Alone(rows, reference.double())
    p, total, weights = Alone(rows, exact), torch.zeros((), dtype=torch.float64), 0.0
    rewards = torch.tensor([row.rewards[0] for row in rows[4:]], dtype=torch.float64)
    centred = rewards - rewards.mean()
    group = centred * 4 / 3 if name == "rloo" else centred / (rewards.std() + 1e-4)
    for i, row in enumerate(rows):
        log_p, from_reference, n = p.tokens[i][0], r.tokens[i][0], len(p.tokens[i][0])
        came = row.replies[0].only.logged
        old = log_p.detach() if i >= 4 else torch.tensor(came.log_probs[-n:]).double()
        advantage = group[i - 4] if i >= 4 else torch.tensor(came.advantages[-n:]).double()
        ratio = (log_p - old).mean().exp() if name == "gspo" else (log_p - old).exp()
        clipped = ratio.clamp(1 - options["clip_low"], 1 + options["clip_high"])
        kl = (from_reference - log_p).exp() - (from_reference - log_p) - 1
        terms = -torch.minimum(ratio * advantage, clipped * advantage) + 0.2 * kl
        value, by = {"rloo": (terms.sum(), 1), "dapo": (terms.mean(), n)}.get(name, (terms.mean(), 1))
        total, weights = total + row.weight * by * value, weights + row.weight * by
    assert trainer.state.log_history[0]["loss"] == pytest.approx((total / weights).item(), rel=2e-5, abs=1e-4)
    assert max(distances(ours, gradients(exact, total / weights))) < 1e-5


def test_packs_with_other_logged_values_are_others():
    objective = Objective("grpo")
    assert str(RatedPacks(ROWS, objective=objective, max_tokens=64, seed=0)).startswith(
        "3 rows of 8"
    )  # whole rewards
    packs = [
        RatedPacks(rows, objective=objective, max_tokens=64, seed=0) for rows in (SAMPLED[:4], SAMPLED[1:4])
    ]
    other = replace(
        SAMPLED[0].replies[0].only, logged=Logged(*(v * 2 for v in SAMPLED[0].replies[0].only.logged[:2]))
    )
    changed = [replace(SAMPLED[0], replies=(Example((other,)),)), *SAMPLED[1:4]]
    packs.append(RatedPacks(changed, objective=objective, max_tokens=64, seed=0))
    assert len({p.fingerprint for p in packs}) == 3


def gradient(trainer) -> dict[str, torch.Tensor]:
    """The gradients of the first optimiser step, as the optimiser sees them."""
    seen = {}

    def keep(*_):
        seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return seen


def test_kto_learns_from_labels_with_the_kl_of_mismatched_pairs(tmp_path):
    rows = [row(i, ((-1) ** i,)) for i in range(4)]
    model, reference = llama(seed=9), llama(seed=3)
    trainer = make(
        tmp_path, rows, model, objective={"name": "kto", "beta": 0.3}, reference=reference, max_tokens=10_000
    )
    trainer.train_from(None)
    order = trainer.train_dataset.packs[0]
    mismatched = []
    for i in order:
        x, y = rows[i].replies[0].only, rows[(i + 1) % 4].replies[0].only
        ids = np.concatenate((x.ids[x.weights == 0], y.ids[y.weights > 0]))
        n = int((x.weights == 0).sum())
        mismatched.append(RatedExample((Example((Sequence(ids, np.arange(len(ids)) >= n),)),), (1,)))
    with torch.no_grad():
        exact = [Alone(mismatched, m.double()) for m in (llama(seed=9), llama(seed=3))]
        gains = [exact[0].value(i, 0) - exact[1].value(i, 0) for i in range(4)]
        kl = max(0.0, float(torch.stack(gains).mean()))
        assert kl > 0.01, "else the replies that are compared change nothing"
        value = expected(
            "kto", rows, Alone(rows, llama(seed=9).double()), Alone(rows, llama(seed=3).double()), kl
        )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value.item(), rel=1e-5)


def test_rows_of_one_prompt_share_a_pack_and_no_row_is_cut():
    rows = [row(i, seed=i % 3) for i in range(9)]
    packs = RatedPacks(rows, objective=Objective("dpo"), max_tokens=48, seed=0)
    assert sorted(i for pack in packs.packs for i in pack) == list(range(9))
    assert all(len({i % 3 for i in pack}) <= 2 for pack in packs.packs)
    items = [packs[i] for i in range(len(packs))]
    assert all(
        len(item["forest"]) <= 48 or len(pack) == 1 for item, pack in zip(items, packs.packs, strict=True)
    )
    assert "9 rows of 18 rated replies" in str(packs)


def test_the_reference_is_computed_once_and_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    rows = [row(i) for i in range(6)]
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
    }

    def run(folder, steps, resume=None):
        trainer = make(tmp_path / folder, rows, eval_dataset=rows[:2], max_steps=steps, **settings)
        trainer.train(resume)
        return trainer

    whole = run("whole", 3)
    run("cut", 1)
    assert len(list((tmp_path / "cut").glob("reference-*.safetensors"))) == 2
    monkeypatch.setattr(yx.PreferenceTrainer, "_computed_reference", lambda *_: pytest.fail("computed again"))
    cut = run("cut", 3, "auto")
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.evaluate()["eval_margin"] == cut.evaluate()["eval_margin"]
    with pytest.raises(CheckpointError, match="objective dpo → ipo changed"):
        make(tmp_path / "cut", rows, max_steps=3, objective="ipo", **settings).train("auto")


def test_evaluation_measures_what_the_objective_is_about(tmp_path):
    rows = [row(0), row(1, (0.5, 3, 0.5, -1))]
    reference = llama(seed=9)
    trainer = make(tmp_path, rows, eval_dataset=rows, reference=reference)
    found = trainer.evaluate()
    with torch.no_grad():
        p, r = (Alone(rows, llama(seed=s).double()) for s in (0, 9))
    pairs = [(i, *pair) for i in range(2) for pair in rows[i].pairs]
    margins = [float(p.value(i, a) - r.value(i, a) - p.value(i, b) + r.value(i, b)) for i, a, b in pairs]
    tokens = {
        good: torch.cat(
            [p.tokens[i][k] for i in range(2) for k, v in enumerate(rows[i].rewards) if (v > 0) == good]
        )
        for good in (True, False)
    }
    d = torch.cat([r.tokens[i][k] - p.tokens[i][k] for i in range(2) for k in range(len(rows[i].rewards))])
    assert len(pairs) == 1 + 5
    assert found["eval_margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert found["eval_accuracy"] == np.mean([m > 0 for m in margins])
    assert found["eval_chosen_nats"] == pytest.approx(-tokens[True].mean().item(), rel=1e-5)
    assert found["eval_rejected_nats"] == pytest.approx(-tokens[False].mean().item(), rel=1e-5)
    assert found["eval_kl"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(expected_dpo(margins), rel=1e-5)
    trained = make(tmp_path / "trained", rows, eval_dataset=rows)
    assert trained.evaluate()["eval_margin"] == 0, "the reference is the model itself"
    trained.train()
    (logged,) = (entry for entry in trained.state.log_history if "loss" in entry)
    assert {"margin", "accuracy", "kl", "chosen_nats"} <= logged.keys()


def expected_dpo(margins: list[float]) -> float:
    losses = -logsigmoid(0.1 * torch.tensor(margins, dtype=torch.float64))
    return float((losses[0] + losses[1:].mean()) / 2)


def test_a_lora_model_is_its_own_reference(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    rows = [row(i) for i in range(3)]
    trainer = make(tmp_path, rows, peft.get_peft_model(llama(), config), eval_dataset=rows)
    base = make(
        tmp_path / "base", rows, peft.get_peft_model(llama(), config), eval_dataset=rows, reference=llama()
    )
    assert trainer.evaluate()["eval_margin"] == base.evaluate()["eval_margin"] != 0
    again = make(tmp_path, rows, peft.get_peft_model(llama(), config), eval_dataset=rows)
    with torch.no_grad():
        again.model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.zero_()
    packs = again.eval_dataset
    assert again._reference_file(packs) == trainer._reference_file(packs), (
        "adapters are no part of the reference"
    )


@pytest.mark.parametrize(
    ("objective", "what"),
    [("dop", "did you mean 'dpo'"), ({"name": "dpo", "betta": 1}, "did you mean 'beta'"),
     ({"name": "reward_weighted", "beta": 1}, "it has none"), ({"name": "dpo", "beta": "x"}, "give a number")],
)  # fmt: skip
def test_unknown_objectives_and_options(tmp_path, objective, what):
    with pytest.raises(ConfigError, match=what):
        make(tmp_path, [row(0)], objective=objective)


def test_data_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="PreferenceEncoder"):
        make(tmp_path, sequences(2))
    with pytest.raises(ConfigError, match="without a pair"):
        make(tmp_path, [row(0, (1,))])
    with pytest.raises(ConfigError, match="RatedExample, not an Example"):
        yx.Trainer(llama(), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), [row(0)])


def test_a_reference_that_is_gone_is_not_made_up(tmp_path):
    rows = [row(i) for i in range(3)]
    trainer = make(tmp_path, rows)
    trainer.train()
    with pytest.raises(ConfigError, match="before its first step"):
        trainer.evaluate(rows[:1])


def test_a_loss_that_is_no_number_names_its_rows(tmp_path):
    model = llama()
    trainer = make(tmp_path, [row(7)], model, reference=llama())
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(LossError, match="row 7, chosen, row 7, rejected"):
        trainer.train()


def test_an_audit_of_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="an audit can't look at"):
        yx.audit(trainer=make(tmp_path, [row(0)]))
