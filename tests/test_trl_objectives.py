"""Against TRL's own trainers on TRL's own batches: the same values, the same gradients. And the examples stay short."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import llama
from trees import gradients

from ygivenx import Sequence, Targets, log_probs, objectives

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

EXAMPLES = Path(__file__).parents[1] / "examples"
PAIRS = [
    {"prompt": "Hi there", "chosen": " yes, of course", "rejected": " no"},
    {"prompt": "The capital is", "chosen": " Paris", "rejected": " Lyon or so"},
]


def models(tokenizer) -> list[torch.nn.Module]:
    return [llama(seed=s, vocab_size=len(tokenizer)) for s in (0, 1)]


def assert_equal(model, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7)
    a, b = gradients(model, ours), gradients(model, theirs)
    assert max(float((a[n] - g).norm() / g.norm()) for n, g in b.items()) < tolerance


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_pairs(smol_tokenizer, tmp_path, loss):
    model, reference = models(smol_tokenizer)
    args = trl.DPOConfig(
        str(tmp_path), loss_type=[loss], beta=0.1, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, per_device_train_batch_size=2,
    )  # fmt: skip
    given = {
        "args": args,
        "train_dataset": datasets.Dataset.from_list(PAIRS),
        "processing_class": smol_tokenizer,
    }
    theirs = trl.DPOTrainer(model, reference, **given)
    batch = next(iter(theirs.get_train_dataloader()))
    example = runpy.run_path(str(EXAMPLES / "trl_dpo.py"))
    if loss == "sigmoid":
        ours = example["ForestDPOTrainer"](model, reference, **given).compute_loss(model, batch)
    else:
        targets = Targets.of(example["sequences"](batch))
        means = [side for m in (model, reference) for side in log_probs(m, targets).means().chunk(2)]
        ours = objectives.ipo(*means).mean()
    assert_equal(model, ours, theirs.compute_loss(model, batch))


def test_labels_with_the_kl_of_mismatched_pairs(smol_tokenizer, tmp_path):
    """TRL's KTOTrainer on a batch of ids; its KL divergence is the one that `kto_kl` estimates."""
    model, reference = models(smol_tokenizer)
    args = trl.KTOConfig(
        str(tmp_path), beta=0.2, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        per_device_train_batch_size=3, desirable_weight=1.0, undesirable_weight=1.5,
    )  # fmt: skip
    rows = [
        {"prompt": "Hi", "completion": f" {w}", "label": i != 1} for i, w in enumerate(("yes", "no no", "so"))
    ]
    theirs = trl.KTOTrainer(
        model,
        reference,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=smol_tokenizer,
    )
    batch = next(iter(theirs.get_train_dataloader()))
    targets, mismatched = (
        Targets.of(
            Sequence(ids[seen > 0], mask[seen > 0])
            for ids, mask, seen in zip(
                *(batch[p + n].numpy() for n in ("input_ids", "completion_mask", "attention_mask")),
                strict=True,
            )
        )
        for p in ("", "KL_")
    )
    with torch.no_grad():
        kl = objectives.kto_kl(*(log_probs(m, mismatched).sums() for m in (model, reference)))
        before = log_probs(reference, targets).sums()
    good = torch.as_tensor(batch["label"], dtype=torch.bool)
    ours = objectives.kto(
        log_probs(model, targets).sums(), before, good, kl, beta=0.2, undesirable_weight=1.5
    ).mean()
    assert_equal(model, ours, theirs.compute_loss(model, batch))


@pytest.mark.filterwarnings("ignore")
def test_pairs_without_a_reference():
    """TRL's functions of ORPO and SimPO, on the same log-probabilities."""
    from types import SimpleNamespace

    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    chosen, rejected = (-torch.rand(5, generator=torch.Generator().manual_seed(s)) * 3 for s in (0, 1))
    device = SimpleNamespace(device="cpu")
    losses, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=device), chosen, rejected)
    torch.testing.assert_close(objectives.orpo(chosen, rejected, beta=0.3), -chosen - losses)
    settings = SimpleNamespace(
        beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=0, accelerator=device, alpha=0.0
    )
    losses, *_ = CPOTrainer.cpo_loss(settings, chosen, rejected)
    torch.testing.assert_close(objectives.simpo(chosen, rejected, beta=2.0, gamma=0.7), losses)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"loss_type": "grpo", "use_bias_correction_kl": False}, {"kl_weight": 0.05}),
        ({"loss_type": "grpo"}, {"kl_weight": 0.05, "kl_times_ratio": True}),
        ({"loss_type": "bnpo", "epsilon_high": 0.28}, {"mean": "token", "clip": (0.2, 0.28)}),
        ({"loss_type": "dr_grpo", "max_completion_length": 16}, {"mean": 4.0 * 16}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
         {"level": "sequence", "clip": (0.01, 0.01)}),
    ],
)  # fmt: skip
def test_groups(smol_tokenizer, tmp_path, settings, options):
    model, _ = models(smol_tokenizer)
    args = trl.GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=4, per_device_train_batch_size=4,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    theirs = trl.GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), args=args, processing_class=smol_tokenizer,
        train_dataset=datasets.Dataset.from_list([{"prompt": "Hi"}] * 4),
    )  # fmt: skip
    theirs.beta = options.get("kl_weight", 0)  # given before, it would load a reference model by name
    theirs.current_gradient_accumulation_steps = 1
    rng = np.random.default_rng(0)
    prompt, lengths = rng.integers(0, 1000, 5), [6, 4, 5, 2]
    replies = np.full((4, 6), smol_tokenizer.pad_token_id)
    mask = np.arange(6) < np.array(lengths)[:, None]
    replies[mask] = rng.integers(0, 1000, sum(lengths))
    rows = [
        Sequence(np.concatenate((prompt, r[m])), np.repeat([0.0, 1.0], [5, m.sum()]))
        for r, m in zip(replies, mask, strict=True)
    ]
    policy = log_probs(model, rows)
    noise = 0.3 * torch.randn(len(policy.log_p), generator=torch.Generator().manual_seed(2))
    old, reference = policy.log_p.detach() + noise, policy.log_p.detach() - 0.5 * noise
    advantages = objectives.group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.0]), 4)
    padded = {
        n: torch.zeros(4, 6).masked_scatter(torch.tensor(mask), v)
        for n, v in (("old", old), ("ref", reference))
    }
    batch = {
        "prompt_ids": torch.tensor(prompt).expand(4, -1), "prompt_mask": torch.ones(4, 5, dtype=torch.long),
        "completion_ids": torch.tensor(replies), "completion_mask": torch.tensor(mask).long(),
        "advantages": advantages, "old_per_token_logps": padded["old"], "ref_per_token_logps": padded["ref"],
        "num_items_in_batch": torch.tensor(sum(lengths)),
    }  # fmt: skip
    ours = objectives.policy_gradient(policy, advantages, old, reference_log_p=reference, **options)
    assert_equal(model, ours, theirs._compute_loss(model, batch))


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short(example):
    assert len(example.read_text().splitlines()) < 60


@pytest.mark.full
@pytest.mark.model
def test_a_group_is_sampled_and_trained(capsys):
    means = runpy.run_path(str(EXAMPLES / "grpo.py"))["main"](steps=1, tokens=4)
    assert len(means) == 1
    assert "entropy" in capsys.readouterr().out
