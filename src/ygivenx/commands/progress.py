"""Progress of a training run as one Rich bar and one line per log entry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

T = TypeVar("T")

# Of rated replies: while training, and held out.
RATED = (
    ("margin", "margin", ".3f", 1),
    ("accuracy", "pairs in order", ".1%", 1),
    ("kl", "KL", ".4f", 1),
    ("chosen_nats", "log Pr(good)/token", ".4f", -1),
    ("rejected_nats", "log Pr(bad)/token", ".4f", -1),
)
# What a log line shows, in this order: key of the log entry, label, format, sign. Log-probabilities are never
# positive; losses, which entries hold as nats, never negative.
SHOWN = (
    ("loss", "loss", ".4f", 1),
    ("log_p_y_per_token", "log Pr(y|x)/token", ".4f", 1),
    ("eval_conditional_nats", "log Pr(y|x)/token", ".4f", -1),
    ("eval_marginal_nats", "log Pr(x)/token", ".4f", -1),
    ("eval_token_accuracy", "accuracy of y", ".1%", 1),
    ("eval_entropy", "entropy of y", ".3f", 1),
    *((f"{when}{name}", label, form, sign) for when in ("", "eval_") for name, label, form, sign in RATED),
    ("grad_norm", "grad", ".3g", 1),
    ("learning_rate", "lr", ".2e", 1),
    ("y_tokens_per_second", "y tokens/s", ".0f", 1),
    ("tokens_per_second", "tokens/s", ".0f", 1),
    ("trained_share", "trained", ".1%", 1),
    ("sharing", "sharing", ".2f", 1),
    ("peak_memory_mib", "peak MiB", ".0f", 1),
    ("memory_share", "of memory", ".0%", 1),
)
SILENCE = 10.0  # seconds after which a run without a terminal says that it is alive


def bar(console: Console) -> Progress:
    """The one look of progress bars, which terminals alone have; it disappears when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        # A finished bar says nothing that the summary below it doesn't.
        transient=True,
        disable=not console.is_terminal,
    )


def shown(
    console: Console, items: Iterable[T], what: Callable[[], str], done: Callable[[T], int],
    total: int | None = None,
) -> Iterator[T]:  # fmt: skip
    """The items, with a bar; without a terminal a line every few seconds.

    what: the words beside the bar. done: how many things are done once this item is. total: of how many, if known.
    """
    spoke, began, first = time.monotonic(), 0.0, 0
    with bar(console) as progress:
        task = progress.add_task(what(), total=total)
        for item in items:
            yield item
            now, count = time.monotonic(), done(item)
            progress.update(task, completed=count, description=what())
            if (
                not began
            ):  # what came before is loading, or was done by an earlier run: it says nothing of the rate
                began, first = now, count
            elif not console.is_terminal and now - spoke > SILENCE / 2:
                rate = (count - first) / (now - began)
                left = f", {timedelta(seconds=round((total - count) / rate))} left" if total and rate else ""
                far = f"{count:,}" + (f" of {total:,}" if total else "")
                console.print(f"{what()}: {far}, {rate:,.1f} a second{left}", highlight=False)
                spoke = now


class RichProgress(TrainerCallback):
    """A bar over optimiser steps, and the log entries that people look at. Only rank 0 speaks.

    Without a terminal there is no bar: a line every few seconds says how far the run is and what remains.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = bar(console)
        self._began = self._spoke = time.monotonic()
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._began = self._spoke = time.monotonic()
            self._first = state.global_step
            self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._break_silence(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step)
        self._break_silence(state)

    def _break_silence(self, state: Any) -> None:
        now = time.monotonic()
        if state.is_world_process_zero and not self.console.is_terminal and now - self._spoke > SILENCE:
            self.console.print(f"step {state.global_step:>5} of {state.max_steps}")
            self._spoke = now

    def _remaining(self, state: Any) -> str:
        """How long the rest takes if its steps take as long as those so far."""
        done = state.global_step - self._first
        if not done:
            return ""
        seconds = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        parts = [
            f"{label} {sign * logs[key]:{fmt}}" for key, label, fmt, sign in SHOWN if logs and key in logs
        ]
        if not state.is_world_process_zero or not parts:
            return
        left = self._remaining(state) if logs and "loss" in logs and not self.console.is_terminal else ""
        line = f"step {state.global_step:>5}  " + "  ".join(parts) + left
        self.console.print(line, highlight=False, soft_wrap=True)
        self._spoke = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def trained(trainer: Any, start: Path | None) -> Any:
    """trainer.train_from(start); whatever ends it, its bar is gone afterwards: it would leave the cursor hidden."""
    try:
        return trainer.train_from(start)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RichProgress):
                callback.progress.stop()
