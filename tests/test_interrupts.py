"""A signal ends a run after its step, with a checkpoint from which the same run goes on."""

from __future__ import annotations

import os
import signal

import pytest
from test_trainer import make, weights_of
from tiny import llama, sequences
from transformers import TrainerCallback

from ygivenx.training.interrupts import Interrupts


class Kill(TrainerCallback):
    def __init__(self, number, times=1):
        self.number, self.times = number, times

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_default_run_that_is_interrupted_goes_on_to_the_same_bits(tmp_path, number):
    data, settings = sequences(12, seed=4), {"max_steps": 4, "max_tokens": 48, "save_strategy": "no"}
    straight = make(tmp_path / "straight", data, **settings)
    straight.train()
    straight.save_model(str(tmp_path / "whole"))

    said: list[str] = []
    cut, interrupts = make(tmp_path / "cut", data, **settings), Interrupts(said.append)
    cut.add_callback(interrupts)
    cut.add_callback(Kill(number))
    before = signal.getsignal(number)
    interrupts.begin()
    try:
        cut.train()
    finally:
        interrupts.end()
    assert signal.getsignal(number) is before
    assert (interrupts.received, cut.state.global_step) == (number, 2)
    assert "a checkpoint after this step" in said[0]
    again = make(tmp_path / "cut", data, model=llama(seed=9), **settings)
    again.train(resume_from_checkpoint="auto")
    again.save_model(str(tmp_path / "again"))
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "whole")


def test_a_second_signal_ends_at_once(tmp_path):
    trainer, interrupts = make(tmp_path, sequences(4), max_steps=4), Interrupts()
    trainer.add_callback(Kill(signal.SIGINT, times=2))
    interrupts.begin()
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        interrupts.end()
    assert not list(tmp_path.glob("checkpoint-*"))
