"""The share of a run's time that logging takes, every step into TensorBoard's files where that is installed.

    python benchmarks/log_share.py GSM8K.jsonl --steps 8

Timed are what counts each micro-batch, every call of `Trainer.log` with its callbacks, and the whole run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

import ygivenx as yx
from ygivenx.rows.data import read
from ygivenx.training.trainer import Meter


class Timed:
    """A function that adds up the time it takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="GSM8K as JSON Lines")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    model, tokenizer = yx.load("sample")
    examples, _ = yx.Encoder(tokenizer).batch(read(options.source, x="question", y="answer", limit=64))
    loggers = [name for name in ("tensorboard",) if name in get_available_reporting_integrations()]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            report_to=loggers,
            disable_tqdm=True,
            max_steps=options.steps,
            logging_steps=1,
            save_strategy="no",
        )
        trainer = yx.Trainer(model=model, args=args, train_dataset=examples, max_tokens=1024)
        trainer.remove_callback(PrinterCallback)
        count = Timed(Meter.add)
        Meter.add = lambda *given: count(*given)  # type: ignore[method-assign]
        trainer.log = write = Timed(trainer.log)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    share = (count.seconds + write.seconds) / seconds
    print(f"{options.steps} steps, {loggers or 'no logger'}: {seconds:.1f} s, counting {count.seconds * 1e3:.1f} ms, "
          f"logging {write.seconds * 1e3:.1f} ms: {share:.3%} of the run")  # fmt: skip


if __name__ == "__main__":
    main()
