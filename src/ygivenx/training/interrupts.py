"""Ctrl-C and SIGTERM end a run after its step, with a checkpoint to go on from."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts(TrainerCallback):
    """Between `begin` and `end`, the first signal asks for a checkpoint after the step; a second one ends at once.

    received: the signal's number, 0 before one comes. The handlers are set in the main thread only.
    """

    def __init__(self, announce: Any = None) -> None:
        self.received = 0
        self._announce = announce or (lambda text: None)
        self._replaced: dict[int, Any] = {}

    def begin(self) -> None:
        """Take the signals over."""
        for number in SIGNALS:
            try:
                self._replaced[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread: whoever runs there has handlers of their own
                return

    def end(self) -> None:
        """Give the signals back."""
        while self._replaced:
            signal.signal(*self._replaced.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        self._announce(f"{signal.Signals(number).name}: a checkpoint after this step; once more ends at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Asks for a checkpoint and the end, on all ranks if one of them was interrupted."""
        self.received = _on_any_rank(self.received, args)
        if self.received:
            control.should_save = control.should_log = control.should_training_stop = True


def _on_any_rank(number: int, args: TrainingArguments) -> int:
    if args.world_size == 1 or not distributed.is_initialized():
        return number
    seen = torch.tensor(number, device=args.device)
    distributed.all_reduce(seen, distributed.ReduceOp.MAX)
    return int(seen)
