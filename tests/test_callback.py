"""The callback on real trainers: numbers that add up to the ledger's, and a warning where x is trained."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from tiny import llama, sequences
from transformers import Trainer, TrainingArguments

from ygivenx.errors import ConfigError
from ygivenx.proof.callback import Watch, XTrainedWarning
from ygivenx.scores.node_log_probs import node_log_probs
from ygivenx.sequence import Segment, Sequence


def run(tmp_path, data, labels, watch, steps=12, kind=Trainer):
    """Plain transformers training of a tiny model on single rows."""
    rows = [
        {"input_ids": torch.tensor(s.ids), "labels": torch.tensor(lab)}
        for s, lab in zip(data, labels, strict=True)
    ]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=1, learning_rate=3e-3,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = kind(model=llama(), args=args, train_dataset=rows, callbacks=[watch])
    trainer.train()
    return trainer


def with_end(s):
    """The last token of a sequence as its end of turn."""
    prompt, answer = s.segments
    end = Segment(answer.stop - 1, answer.stop, "end_of_turn", output=True)
    return Sequence(s.ids, s.weights, (prompt, Segment(answer.start, answer.stop - 1, "answer", True), end))


def test_y_improves_and_nothing_is_said(tmp_path):
    data = [with_end(s) for s in sequences(4, low=12)]
    watch = Watch(data, every=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", XTrainedWarning)
        trainer = run(tmp_path, data, [s.labels for s in data], watch)
    first, last = watch.history[0], watch.history[-1]
    assert [m.step for m in watch.history] == [0, 5, 10, 12]
    assert last.conditional < first.conditional - 0.2
    assert last.end_of_turn < first.end_of_turn
    assert math.isnan(first.trained_share)
    assert 0.2 < last.trained_share < 0.7
    logged = [h for h in trainer.state.log_history if "ygx_conditional" in h]
    assert [h["step"] for h in logged] == [0, 5, 10, 12]
    assert trainer.model.training


def test_a_run_that_trains_x_is_named(tmp_path):
    data = sequences(4, low=12)
    watch = Watch(data, every=6)
    with pytest.warns(XTrainedWarning, match="as if x were trained; the first step trained 100%") as caught:
        run(tmp_path, data, [s.ids for s in data], watch)
    assert len([w for w in caught if w.category is XTrainedWarning]) == 1


def test_the_numbers_are_the_scores(tmp_path):
    data = sequences(3)
    watch = Watch(data, every=100, probe_first_step=False)
    model = llama()
    run(tmp_path, data, [s.labels for s in data], watch, steps=1)
    log_p = node_log_probs(model, watch.forest)
    y = np.concatenate([log_p[p][s.weights > 0] for p, s in zip(watch.forest.paths, data, strict=True)])
    assert watch.history[0].conditional == pytest.approx(-y.mean(), rel=1e-6)


class Elsewhere(Trainer):
    """A step whose loss never passes the model's head."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model.model.norm.weight.sum()


def test_a_probe_that_fails_does_not_end_the_run(tmp_path):
    data = sequences(3)
    watch = Watch(data, every=1)
    with pytest.warns(UserWarning, match="could not be probed: no gradient reached"):
        trainer = run(tmp_path, data, [s.labels for s in data], watch, steps=2, kind=Elsewhere)
    assert trainer.state.global_step == 2
    assert [m.step for m in watch.history] == [0, 1, 2]
    assert math.isnan(watch.history[-1].trained_share)


def test_examples_without_x_are_refused():
    with pytest.raises(ConfigError, match="no tokens of x"):
        Watch([Sequence(np.arange(4), np.array([0, 1, 1, 1]), (Segment(0, 4, "answer", True),))])
