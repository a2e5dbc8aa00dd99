"""The Trainer: one denominator per step, evaluation by role, resume that is bitwise equal."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import llama, sequences
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import ygivenx as yx
from ygivenx.errors import CheckpointError, ConfigError, LossError
from ygivenx.sequence import Sequence
from ygivenx.training import checkpoint

HERE = Path(__file__).parent


def make(tmp_path, data, model=None, **overrides):
    own = {k: overrides.pop(k) for k in ("max_tokens", "denominator", "eval_dataset") if k in overrides}
    settings = {
        "output_dir": str(tmp_path),
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    args = TrainingArguments(**settings | overrides)
    return yx.Trainer(model=model or llama(), args=args, train_dataset=data, **{"max_tokens": 64} | own)


def gradient(trainer) -> torch.Tensor:
    """The gradient of the first optimiser step, as the optimiser sees it."""
    seen = {}

    def keep(optimizer, *_):
        seen.setdefault(
            "g", torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]])
        )

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return seen["g"]


@pytest.mark.parametrize("steps", [2, 4])
def test_accumulation_does_not_change_the_gradient(tmp_path, steps):
    """The same rows in 1, 2 and 4 micro-batches of unequal weight: one denominator, one gradient."""
    data = sequences(4, seed=5)
    whole = gradient(make(tmp_path / "whole", data, max_steps=1, max_tokens=10_000, max_grad_norm=0.0))
    size = max(len(s) for s in data) if steps == 4 else sum(len(s) for s in data) // 2 + 12
    trainer = make(
        tmp_path, data, max_steps=1, max_tokens=size, gradient_accumulation_steps=steps, max_grad_norm=0.0
    )
    assert len(trainer.train_dataset) == steps
    parts = gradient(trainer)
    assert ((parts - whole).norm() / whole.norm()).item() < 1e-6


def test_loss_is_the_plain_cross_entropy_of_the_trained_tokens(tmp_path):
    data = sequences(3, seed=2)
    model = llama()
    total, count = 0.0, 0
    for s in data:
        logits = model(torch.from_numpy(np.array(s.ids))[None]).logits[0, :-1].double()
        picked = logits.log_softmax(-1).gather(1, torch.from_numpy(np.array(s.ids[1:]))[:, None])[:, 0]
        total -= float((picked * torch.from_numpy(np.array(s.weights[1:]))).sum().detach())
        count += int(s.weights.sum())
    trainer = make(tmp_path, data, model=model, max_steps=1, max_tokens=10_000, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_the_sequence_denominator_is_the_mean_of_means(tmp_path):
    data = sequences(3, seed=2)
    each = [yx.loss(llama(), s).value.item() for s in data]
    trainer = make(tmp_path, data, max_steps=1, max_tokens=10_000, logging_steps=1, denominator="sequence")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(each), abs=1e-4)


def test_what_was_just_evaluated_is_not_evaluated_again(tmp_path):
    from ygivenx.commands.finetune import evaluation

    data = sequences(6)
    for strategy, again in (("steps", 0), ("no", 1)):
        settings = {"max_steps": 2, "eval_strategy": strategy, "eval_steps": 1}
        trainer = make(tmp_path / strategy, data, eval_dataset=data, **settings)
        trainer.train()
        before = len(trainer.state.log_history)
        told = evaluation(trainer)
        assert len(trainer.state.log_history) - before == again
        assert told["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("denominator", ["tokens", "sequence"])
def test_evaluation_divides_as_training_does(tmp_path, denominator):
    data = sequences(5, seed=3)
    settings = {"max_steps": 1, "max_tokens": 10_000, "logging_steps": 1, "denominator": denominator}
    trainer = make(tmp_path, data, eval_dataset=data, **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(before, abs=1e-4)


def test_the_last_step_is_logged(tmp_path):
    trainer = make(tmp_path, sequences(4), max_steps=3, logging_steps=5)
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [3]


def test_the_gradient_is_right_whoever_divides(tmp_path):
    """transformers 5.2 divides a loss that is divided already by the number of micro-batches."""
    data = sequences(4, seed=5)
    settings = {"max_steps": 1, "max_tokens": 60, "max_grad_norm": 0.0, "logging_steps": 1}
    right, wrong = (make(tmp_path / n, data, gradient_accumulation_steps=2, **settings) for n in "ab")
    wrong.loss_is_scaled_for_ga = False
    assert torch.equal(gradient(wrong), gradient(right))
    assert wrong.state.log_history[0]["loss"] == right.state.log_history[0]["loss"]


def test_float16_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"would be trained in float16(.|\n)*--dtype fp16"):
        make(tmp_path, sequences(2), model=llama(dtype=torch.float16))


@pytest.mark.parametrize(("rate", "lost"), [(1e-6, True), (10.0, False)])
def test_updates_that_round_away_are_counted(tmp_path, caplog, rate, lost):
    settings = {"max_steps": 3, "warmup_steps": 1, "lr_scheduler_type": "constant_with_warmup"}
    model = llama(dtype=torch.bfloat16)
    make(tmp_path, sequences(4), model=model, learning_rate=rate, **settings).train()
    assert ("of the updates round away" in caplog.text) is lost
    caplog.clear()
    make(tmp_path / "mixed", sequences(4), bf16=True, **settings).train()
    assert "round away" not in caplog.text


def test_mixed_precision_keeps_its_weights_in_float32(tmp_path):
    data = sequences(6)
    losses = {}
    for bf16 in (False, True):
        trainer = make(
            tmp_path / str(bf16), data, max_steps=4, logging_steps=1, bf16=bf16, learning_rate=1e-3
        )
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        losses[bf16] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.skipif(find_spec("optimi") is None, reason="torch-optimi is not installed")
def test_kahan_summation_loses_no_update(tmp_path, caplog):
    """At a rate at which nearly all updates of bfloat16 weights round away, its run goes the way of float32 weights."""
    settings = {
        "max_steps": 40,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }
    ends = {}
    for name, optimizer, dtype in (
        ("float32", "stable_adamw", torch.float32),
        ("kahan", "stable_adamw", torch.bfloat16),
        ("plain", "adamw_torch", torch.bfloat16),
    ):
        caplog.clear()
        model = llama(dtype=torch.bfloat16).to(dtype)
        start = torch.cat([p.detach().float().flatten() for p in model.parameters()])
        make(tmp_path / name, sequences(20), model=model, optim=optimizer, **settings).train()
        assert ("round away" in caplog.text) is (name == "plain")
        ends[name] = torch.cat([p.detach().float().flatten() for p in model.parameters()]) - start
    errors = {n: (ends[n] - ends["float32"]).norm() / ends["float32"].norm() for n in ("kahan", "plain")}
    assert errors["plain"] > 0.8
    assert errors["kahan"] < 0.5


@pytest.mark.parametrize("spoil", ["a bit", "the folder"])
def test_the_best_model_is_the_one_that_was_written(tmp_path, spoil):
    class Spoil(TrainerCallback):
        def on_save(self, args, state, control, **_):
            best = Path(state.best_model_checkpoint)
            if spoil == "the folder":
                shutil.rmtree(best, ignore_errors=True)
            else:
                file = best / "model.safetensors"
                file.write_bytes(file.read_bytes()[:-1] + b"!")

    data = sequences(4)
    settings = {"max_steps": 2, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(tmp_path, data, eval_dataset=data, load_best_model_at_end=True, **settings)
    trainer.add_callback(Spoil())
    with pytest.raises(CheckpointError, match="no such checkpoint" if spoil == "the folder" else "altered"):
        trainer.train()


def test_evaluation_tells_y_from_x(tmp_path):
    data = sequences(5, seed=3)
    trainer = make(tmp_path, data, eval_dataset=data)
    metrics = trainer.evaluate()
    books = [yx.ledger(trainer.model, s) for s in data]
    y = -sum(b.conditional for b in books) / sum(int(s.output.sum()) for s in data)
    x = -sum(b.marginal for b in books) / sum(int((~s.output).sum()) - 1 for s in data)
    assert metrics["eval_conditional_nats"] == pytest.approx(y, rel=1e-5)
    assert metrics["eval_marginal_nats"] == pytest.approx(x, rel=1e-5)
    first = count = entropy = 0
    for s in data:
        logits = trainer.model(torch.from_numpy(np.array(s.ids))[None]).logits[0, :-1]
        hit = logits.argmax(-1).numpy() == s.ids[1:]
        first, count = first + hit[s.output[1:]].sum(), count + s.output.sum()
        entropy += (
            torch.distributions.Categorical(logits=logits).entropy().detach()[s.output[1:]].sum().item()
        )
    assert metrics["eval_token_accuracy"] == first / count
    assert metrics["eval_entropy"] == pytest.approx(entropy / count, rel=1e-5)


def test_a_log_entry_says_how_probable_y_is_and_how_full_the_memory(tmp_path):
    trainer = make(tmp_path, sequences(4), max_steps=2, logging_steps=1)
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["log_p_y_per_token"] for e in entries] == pytest.approx([-e["loss"] for e in entries], rel=1e-3)
    assert all(0 < e["memory_share"] < 1 for e in entries)


def test_a_non_finite_loss_stops_before_the_update_and_names_the_rows(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = float("nan")
    good = [s for s in sequences(9) if 96 not in s.ids]
    data = [*good[:2], Sequence(np.array([5, 96, 7]), np.array([0, 1, 1], np.float32)), *good[2:4]]
    trainer = make(tmp_path, data, model=model, max_tokens=10_000, max_steps=3)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(LossError, match=r"the loss is nan, in .*row 2"):
        trainer.train()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True) if not q.isnan().any()
    )


def test_packs_without_weight_are_counted_not_trained(tmp_path):
    silent = Sequence(np.arange(60), np.zeros(60, np.float32))
    trainer = make(tmp_path, [*sequences(2, low=10, high=20), silent])
    assert trainer.train_dataset.skipped == 1
    with pytest.raises(ConfigError, match="nothing to train on"):
        make(tmp_path, [silent])


@pytest.mark.parametrize(
    "bad",
    [{"denominator": "rows"}]
    + [
        {k: len}
        for k in ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
    ],
)
def test_options_that_have_no_meaning_here_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError):
        yx.Trainer(model=llama(), args=TrainingArguments(str(tmp_path)), train_dataset=sequences(2), **bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"auto_find_batch_size": True}, {"average_tokens_across_devices": False}, {"bf16_full_eval": True},
        {"ignore_data_skip": True}, {"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0},
        {"torch_compile": True}, {"train_sampling_strategy": "group_by_length"},
    ],
)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused_by_name(tmp_path, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        make(tmp_path, sequences(2), **bad)


def test_a_batch_size_is_said_to_be_none(tmp_path, caplog):
    make(tmp_path, sequences(2), per_device_train_batch_size=4)
    assert "per_device_train_batch_size=4 has no meaning here" in caplog.text


def test_a_disk_that_is_full_leaves_what_was_saved(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of file sizes are set by it")
    data, settings = sequences(4), {"max_steps": 2, "save_steps": 1}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_save(self, *_, **__):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))

    trainer = make(tmp_path, data, **settings)
    trainer.add_callback(Full())
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2: it couldn't be written(.|\n)*make room"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.newest(tmp_path).name == "checkpoint-1"
    assert make(tmp_path, data, **settings).train(resume_from_checkpoint="auto").global_step == 2


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"2 GPUs in one process(.|\n)*torchrun"):
        yx.Trainer(model=llama(), args=args, train_dataset=sequences(2))


def test_predict_says_what_there_is_instead(tmp_path):
    with pytest.raises(ConfigError, match=r"no predict\(\)(.|\n)*yx\.score"):
        make(tmp_path, sequences(2)).predict(sequences(2))


@pytest.mark.parametrize("item", [{"messages": []}, "text", yx.Forest.of(sequences(2))])
def test_rows_that_were_not_encoded_are_refused(tmp_path, item):
    for options in ({"data": [item]}, {"data": sequences(2), "eval_dataset": [*sequences(1), item]}):
        with pytest.raises(
            ConfigError, match=rf"item \d of the data set is a {type(item).__name__}(.|\n)*Encoder"
        ):
            make(tmp_path, **options)


def test_held_out_rows_are_there_at_every_evaluation(tmp_path):
    data = sequences(4)
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(tmp_path, data, eval_dataset=iter(data), **settings)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
    many = make(tmp_path / "many", data, eval_dataset={"a": data, "b": iter(data[:2])})
    assert (
        many.evaluate("b")["eval_loss"] == many.evaluate()["eval_b_loss"] != many.evaluate("a")["eval_loss"]
    )
    with pytest.raises(ConfigError, match="eval_dataset is empty"):
        make(tmp_path, data, eval_dataset=[])


def test_tokens_seen_are_those_of_all_sequences(tmp_path):
    data = sequences(6)
    trainer = make(tmp_path, data, num_train_epochs=2, include_num_input_tokens_seen=True)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 2 * sum(map(len, data))


def test_the_order_of_the_data_has_a_seed_of_its_own(tmp_path):
    def order(**seeds):
        trainer = make(tmp_path, sequences(20), max_tokens=48, **seeds)
        return trainer.train_dataset.fingerprint, list(trainer._get_train_sampler())

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) != order(seed=1)


def test_the_best_step_need_not_be_one_that_is_saved(tmp_path):
    data = sequences(4)
    settings = {
        "max_steps": 6,
        "save_steps": 4,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    best = {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-2}
    trainer = make(tmp_path, data, eval_dataset=data, **settings, **best)
    trainer.train()
    assert trainer.state.best_global_step < 4
    assert trainer.state.best_model_checkpoint is None


def test_early_stopping_goes_on_counting(tmp_path):
    data = sequences(4)
    settings = {
        "max_steps": 9, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip

    def run(resume=None):
        trainer = make(tmp_path, data, eval_dataset=data, **settings)
        trainer.add_callback(EarlyStoppingCallback(4))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step

    stopped = run()
    assert stopped < 9
    shutil.rmtree(tmp_path / f"checkpoint-{stopped}")
    shutil.rmtree(tmp_path / f"checkpoint-{stopped - 1}")
    assert run("auto") == stopped


def weights_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_resume_is_bitwise_equal(tmp_path):
    data = sequences(12, seed=4)
    settings = {"num_train_epochs": 3, "save_steps": 2, "gradient_accumulation_steps": 2, "max_tokens": 48}
    straight = make(tmp_path / "a", data, **settings)
    straight.train()
    last = checkpoint.newest(tmp_path / "a")
    first = checkpoint.listed(tmp_path / "a")[0]
    os.makedirs(tmp_path / "b")
    os.rename(first, tmp_path / "b" / first.name)
    again = make(tmp_path / "b", data, model=llama(seed=9), **settings)
    again.train(resume_from_checkpoint="auto")
    assert weights_of(tmp_path / "b" / last.name) == weights_of(last)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    settings = {"max_steps": 2, "save_steps": 2}
    make(tmp_path, sequences(4, seed=1), **settings).train()
    with pytest.raises(CheckpointError, match="packs changed"):
        make(tmp_path, sequences(4, seed=2), **settings).train(resume_from_checkpoint="auto")


def test_a_fresh_run_does_not_mix_its_checkpoints_with_another_s(tmp_path):
    data = sequences(4)
    first = make(tmp_path, data, max_steps=2, save_steps=1, save_total_limit=1)
    first.train()
    first.train()  # its own may be replaced
    with pytest.raises(CheckpointError, match="another run are there: checkpoint-2"):
        make(tmp_path, data, max_steps=1, save_steps=1).train()
    assert [p.name for p in checkpoint.listed(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate 5e-05 → 0.001 changed"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type linear → cosine"),
        ({"warmup_steps": 1}, "warmup_steps 0 → 1"),
        ({"weight_decay": 0.5}, r"weight_decay 0\.0 → 0\.5"),
        ({"max_grad_norm": 0.5}, r"max_grad_norm 1\.0 → 0\.5"),
        ({"lr_scheduler_kwargs": {"last_epoch": -1}}, "lr_scheduler_kwargs None → "),
        ({"max_steps": 4}, "length 2 steps → 4 steps"),  # the rate of a linear schedule depends on it
        ({"model": llama(dtype=torch.bfloat16)}, "dtypes .*float32.* → .*bfloat16"),
        ({"model": llama(rms_norm_eps=1e-3)}, "the model's rms_norm_eps 1e-06 → 0.001"),
        ({"model": llama().requires_grad_(False)}, r"trained_parameters \d+ → 0"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, changed, said):
    settings = {"max_steps": 2, "save_steps": 2}
    make(tmp_path, sequences(4), **settings).train()
    with pytest.raises(CheckpointError, match=said):
        make(tmp_path, sequences(4), **settings | changed).train(resume_from_checkpoint="auto")


def test_a_run_of_a_constant_rate_may_be_longer(tmp_path):
    settings = {"save_steps": 1, "lr_scheduler_type": "constant"}
    data = sequences(4)
    make(tmp_path / "a", data, max_steps=1, **settings).train()
    longer = make(tmp_path / "a", data, max_steps=3, **settings)
    longer.train(resume_from_checkpoint="auto")
    make(tmp_path / "b", data, max_steps=3, **settings).train()
    assert weights_of(tmp_path / "a" / "checkpoint-3") == weights_of(tmp_path / "b" / "checkpoint-3")


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 1.5}])
def test_a_finished_run_is_not_trained_further(tmp_path, caplog, length):
    settings = {**length, "save_steps": 1, "max_tokens": 48, "logging_steps": 1}
    done = make(tmp_path, sequences(12, seed=4), **settings)
    done.train()
    assert done.state.global_step == done.steps
    before = weights_of(checkpoint.newest(tmp_path))
    again = make(tmp_path, sequences(12, seed=4), model=llama(seed=9), **settings)
    outcome = again.train(resume_from_checkpoint="auto")
    assert outcome.global_step == again.state.global_step == done.state.global_step
    assert np.isnan(outcome.training_loss)
    assert "nothing is left to train" in caplog.text
    logged = [[e for e in t.state.log_history if "loss" in e] for t in (again, done)]
    assert len(logged[0]) == len(logged[1])
    for p, q in zip(again.model.parameters(), done.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert weights_of(checkpoint.newest(tmp_path)) == before


def test_the_log_says_what_is_trained_and_by_which_routes(tmp_path, caplog):
    with caplog.at_level("INFO", logger="ygivenx"):
        make(tmp_path, sequences(4), max_steps=1).train()
    assert "4 sequences in" in caplog.text
    assert "attention: one sequence plain, sequences that share nothing blocks, forest blocks" in caplog.text


def test_a_checkpoint_without_an_optimizer_is_not_resumed_from(tmp_path):
    settings = {"max_steps": 3, "save_steps": 1, "save_only_model": True}
    make(tmp_path, sequences(4), **settings).train()
    make(tmp_path, sequences(4), **settings).train(resume_from_checkpoint="auto")  # it is finished
    for_two = settings | {"lr_scheduler_type": "constant", "max_steps": 2}
    make(tmp_path / "b", sequences(4), **for_two).train()
    with pytest.raises(CheckpointError, match="the model alone"):
        make(tmp_path / "b", sequences(4), **for_two | {"max_steps": 3}).train(resume_from_checkpoint="auto")


class Executed:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"]
)
@pytest.mark.parametrize("content", ["pickle", "text", "nothing"])
def test_a_sealed_file_of_another_kind_is_an_error_of_ours_and_is_not_run(tmp_path, capsys, name, content):
    settings = {"max_steps": 2, "save_steps": 1, "max_tokens": 48}
    make(tmp_path, sequences(12, seed=4), **settings).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    step = tmp_path / "checkpoint-1"
    step.joinpath(name).write_bytes(
        {"pickle": pickle.dumps(Executed()), "text": b"text", "nothing": b""}[content]
    )
    checkpoint.seal(step)
    with pytest.raises(CheckpointError, match="checkpoint-1: it can't be read"):
        make(tmp_path, sequences(12, seed=4), **settings).train(resume_from_checkpoint="auto")
    assert "executed" not in capsys.readouterr().out


def test_resume_without_a_checkpoint(tmp_path):
    trainer = make(tmp_path, sequences(4), max_steps=1)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 1


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft 0.21 asks by the old name
def test_lora_trains_its_adapters_alone_on_the_same_loss(tmp_path):
    peft = pytest.importorskip("peft", reason="the extra lora is not installed")
    data, base = sequences(4, seed=3), llama()
    before = {n: p.clone() for n, p in base.named_parameters()}
    expected = yx.loss(base, data).value.item()
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    trainer = make(
        tmp_path,
        data,
        model=model,
        max_steps=3,
        max_tokens=10_000,
        logging_steps=1,
        learning_rate=1e-2,
        eval_dataset=data,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[-1]
    after = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters()
    }
    assert all(torch.equal(after[n], p) for n, p in before.items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"lora_alpha": 32}, "lora_alpha 8 → 32"),
        ({"lora_dropout": 0.5}, "lora_dropout"),
        ({"base": 7}, "base_model"),
        ({"edited": True}, "base_model"),
    ],
)
def test_adapters_are_resumed_on_the_model_and_with_the_settings_that_they_had(tmp_path, changed, said):
    """Checkpoints of adapters hold neither."""
    peft = pytest.importorskip("peft", reason="the extra lora is not installed")

    def run(base=0, edited=False, **options):
        settings = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        } | options
        model = llama(seed=base)
        if edited:  # one value in the last row
            model.model.embed_tokens.weight.data[-1, -1] += 1e-3
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        return make(
            tmp_path, sequences(4), model=model, max_steps=steps, save_steps=1, lr_scheduler_type="constant"
        )

    steps = 1
    run().train()
    steps = 2
    if said is None:
        assert run().train(resume_from_checkpoint="auto").global_step == 2
    else:
        with pytest.raises(CheckpointError, match=said):
            run(**changed).train(resume_from_checkpoint="auto")


def test_what_is_pushed_to_the_hub_stays_where_it_is(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(Path(folder)))
    trainer = make(tmp_path, sequences(4), max_steps=2, save_steps=1)
    trainer.args.push_to_hub = True  # after the repository would have been made
    trainer.train()
    assert pushed == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"] == checkpoint.listed(tmp_path)


KILLED = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_trainer import make, sequences
trainer = make(Path({out!r}), sequences(12, seed=4), max_steps={steps}, save_steps=1, max_tokens=48)
trainer.train(resume_from_checkpoint="auto")
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    """A real process, killed (SIGKILL) while it writes checkpoints, again and again, then left to finish."""
    steps = 12
    for attempt in range(4):
        code = KILLED.format(here=str(HERE), out=str(tmp_path / "killed"), steps=steps)
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if attempt < 3:
            seen = len(checkpoint.listed(tmp_path / "killed"))
            while process.poll() is None and len(checkpoint.listed(tmp_path / "killed")) < seen + 2:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
        assert attempt < 3 or process.returncode == 0, stderr.decode()
    make(tmp_path / "straight", sequences(12, seed=4), max_steps=steps, save_steps=1, max_tokens=48).train()
    ends = [tmp_path / name / f"checkpoint-{steps}" for name in ("killed", "straight")]
    assert weights_of(ends[0]) == weights_of(ends[1])
    told = [json.loads((end / "trainer_state.json").read_text())["global_step"] for end in ends]
    assert told == [steps, steps]
