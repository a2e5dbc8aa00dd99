"""Progress of a training run as one Rich bar and one line per log entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

# What a log line shows, in this order: key of the log entry, label, format.
SHOWN = (
    ("loss", "nats/weight", ".4f"),
    ("eval_conditional_nats", "log Pr(y|x) nats/token", ".4f"),
    ("eval_marginal_nats", "log Pr(x) nats/token", ".4f"),
    ("grad_norm", "grad", ".3g"),
    ("learning_rate", "lr", ".2e"),
    ("y_tokens_per_second", "y tokens/s", ".0f"),
    ("trained_share", "trained", ".1%"),
    ("sharing", "sharing", ".2f"),
    ("peak_memory_mib", "peak MiB", ".0f"),
)


def bar(console: Console) -> Progress:
    """The one look of progress bars; it disappears when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class RichProgress(TrainerCallback):
    """A bar over optimiser steps, and the log entries that people look at. Only rank 0 speaks."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = bar(console)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        told = [f"{label} {logs[key]:{fmt}}" for key, label, fmt in SHOWN if logs and key in logs]
        if state.is_world_process_zero and told:
            self.console.print(
                f"step {state.global_step:>5}  " + "  ".join(told), highlight=False, soft_wrap=True
            )

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
