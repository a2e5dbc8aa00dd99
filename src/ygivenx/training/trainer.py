"""`transformers.Trainer` on forests: packs, the selective loss, one denominator per step, safe checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_utils import TrainOutput

from ..errors import ConfigError, LossError
from ..forest import Forest
from ..models import memory
from ..models.families import routes_told
from ..models.wrappers import through
from ..objective import Loss, loss
from . import checkpoint, runs
from .evaluation import evaluate, rates
from .packs import EpochOrder, Packs

logger = logging.getLogger(__name__)


@dataclass
class Meter:
    """What went through since the last log line."""

    since: float = field(default_factory=time.perf_counter)
    weight: float = 0.0
    trained: int = 0
    distinct: int = 0
    total: int = 0

    def add(self, forest: Forest) -> None:
        self.weight += float(forest.weight.sum(dtype=np.float64))
        self.trained += sum(int((forest.weight[p] > 0).sum()) for p in forest.paths)
        self.distinct += len(forest.token)
        self.total += sum(map(len, forest.paths))

    def read(self) -> dict[str, float]:
        """Rates since the last reading; starts anew."""
        seconds = time.perf_counter() - self.since
        if not self.total:
            return {}
        told = {
            "y_tokens_per_second": round(self.trained / seconds, 1),
            "trained_share": round(self.trained / self.total, 4),
            "sharing": round(self.total / self.distinct, 3),
            "peak_memory_mib": round(memory.peak() / 2**20),
        }
        self.__init__()  # type: ignore[misc]
        return told


class Trainer(transformers.Trainer):
    """transformers.Trainer whose batch is a forest.

    train_dataset: Examples or Sequences, packed into forests of at most `max_tokens` distinct tokens. One
    pack is one micro-batch, so `per_device_train_batch_size` has no meaning here and
    `gradient_accumulation_steps` counts packs. eval_dataset: Examples or Sequences (or a dict of such lists).

    The loss of an optimiser step is Σ w·(−log p) / W, W being the sum of weights over its micro-batches and
    all ranks (`denominator="tokens"`), or the mean of per-sequence means (`"sequence"`).

    notes: what else the checkpoints' `ygivenx.json` is to hold, for whoever resumes from them.

    Raises ConfigError for what it can't do, LossError for a non-finite loss (on all ranks, before the
    update, with the rows' names), CheckpointError for a checkpoint that is incomplete or of another run, and for a
    fresh start in a directory that holds checkpoints of another run.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: transformers.TrainingArguments | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Any = None,
        *,
        max_tokens: int = 4096,
        denominator: str = "tokens",
        notes: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if denominator not in ("tokens", "sequence"):
            raise ConfigError(f"unknown denominator {denominator!r}", fix='use "tokens" or "sequence"')
        for name in ("data_collator", "compute_loss_func", "compute_metrics"):
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name} is not used by ygivenx.Trainer",
                    why="its batches are forests",
                    fix="leave it out",
                )
        args = args or transformers.TrainingArguments("trainer_output")
        args.remove_unused_columns = False
        args.per_device_train_batch_size = 1
        args.logging_nan_inf_filter = False
        self.max_tokens, self.denominator = max_tokens, denominator
        packs = None if train_dataset is None else self._packs(train_dataset, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=_only,
            train_dataset=packs,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.meter = Meter()
        self.control: transformers.TrainerControl
        self._staging: Path | None = None
        self._notes, self._published = dict(notes or {}), set[str]()
        self._run: dict[str, Any] = {}

    def _packs(self, items: Iterable[Any], args: transformers.TrainingArguments) -> Packs:
        packs = Packs(items, max_tokens=self.max_tokens, seed=args.seed, denominator=self.denominator)
        if not len(packs):
            raise ConfigError(
                "nothing to train on: no pack has a token with a weight", fix="look at the rejected rows"
            )
        packs.fill(args.world_size)
        return packs

    # -- the loss ------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochOrder(len(self.train_dataset if train_dataset is None else train_dataset), self.args.seed)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """W: the sum of weights over all micro-batches of the step and all ranks, float64."""
        local = sum(float(b["forest"].weight.sum(dtype=np.float64)) for b in batch_samples)
        total = torch.tensor(local, dtype=torch.float64, device=device)
        return self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        forest = inputs["forest"]
        inner = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            # Ranks average their gradients, and W already counts all ranks: undo the average.
            weight = None if num_items_in_batch is None else float(num_items_in_batch) / self.args.world_size
            out = through(model, inner, lambda: loss(inner, forest, denominator=weight))
        self._refuse_non_finite(out, inputs["names"])
        self.meter.add(forest)
        return (out.value, {"log_p": out.log_p}) if return_outputs else out.value

    def _refuse_non_finite(self, out: Loss, names: list[str]) -> None:
        bad = (~torch.isfinite(out.value.detach())).to(torch.float32)
        anywhere = self.accelerator.reduce(bad, "sum") if self.args.world_size > 1 else bad
        if anywhere.item():
            here = f"in {', '.join(_culprits(out, names))}" if bad.item() else "on another rank"
            raise LossError(
                f"the loss is {out.value.item():g}, {here}",
                where=f"step {self.state.global_step + 1}",
                why="an update with it would spoil every weight; none was made",
                fix="look at these rows with `ygx show --row N`, or lower the learning rate",
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 × parameters × tokens fed (Kaplan et al. 2020, section 2.1)."""
        return 6 * len(inputs["forest"].fed) * sum(p.numel() for p in self.model.parameters())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.meter.read()}
        super().log(logs, start_time)

    # -- evaluation ----------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Nats per token of y (`conditional_nats`) and of x (`marginal_nats`), apart, and the weighted loss."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            many = [self.evaluate(d, ignore_keys, f"{metric_key_prefix}_{name}") for name, d in data.items()]
            return {k: v for metrics in many for k, v in metrics.items()}
        if data is None:
            raise ConfigError("no eval_dataset", fix="give the Trainer one, or pass it to evaluate()")
        started = time.perf_counter()
        sums = evaluate(
            self.model,
            data,
            max_tokens=self.max_tokens,
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in rates(sums).items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run, as transformers counts them."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        packs = len(self.train_dataset) // self.args.world_size
        return math.ceil(self.args.num_train_epochs * -(-packs // self.args.gradient_accumulation_steps))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers', and `resume_from_checkpoint="auto"`: the newest complete one, or a fresh start.

        A run that is finished already only gets the weights and the log of its last checkpoint back; the training
        loss of its output is NaN.
        """
        path = checkpoint.start(Path(self.args.output_dir), resume_from_checkpoint, self._published)
        self._run = self._identity()  # before the model is wrapped or sharded
        self.meter = Meter()
        memory.keep_freed_memory()
        logger.info("%s; %s", self.train_dataset, routes_told(self.accelerator.unwrap_model(self.model)))
        if path is None:
            return super().train(**kwargs)
        runs.same(runs.recalled(path), self._run, path)
        done = transformers.TrainerState.load_from_json(str(path / runs.STATE))
        if done.global_step >= self.steps:  # transformers looks at its limit after a step
            return self._finished(path, done)
        return super().train(resume_from_checkpoint=str(path), **kwargs)

    def _finished(self, path: Path, state: transformers.TrainerState) -> TrainOutput:
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or str(path))
        self.state = state
        logger.warning("%s: step %d of %d, nothing is left to train", path, state.global_step, self.steps)
        return TrainOutput(state.global_step, math.nan, {})

    def _identity(self) -> dict[str, Any]:
        return {
            "packs": self.train_dataset.fingerprint,
            **runs.settings(self.args),
            **runs.trained(self.model),
        }

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' own files, written to a staging directory, sealed, then renamed into place."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = run_dir / checkpoint.STAGING
        if self.is_world_process_zero():
            checkpoint.clear(self._staging)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._publish(self._staging / name, run_dir / name)
            self.accelerator.wait_for_everyone()
            self._published.add(name)
        finally:
            self._staging = None

    def _publish(self, staged: Path, final: Path) -> None:
        # The best checkpoint was named by its staging path: give it the one that it will have.
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(final.parent / f"checkpoint-{self.state.best_global_step}")
            self.state.save_to_json(str(staged / runs.STATE))
        runs.remember(staged, {**self._notes, **self._run})
        checkpoint.seal(staged)
        checkpoint.publish(staged, final)
        step, best = self.state.global_step, self.state.best_model_checkpoint
        checkpoint.rotate(final.parent, self.args.save_total_limit, step, best)


def _culprits(out: Loss, names: list[str]) -> list[str]:
    """The sequences with a non-finite log p; all of the pack where no single one stands out."""
    bad = out.edges.nodes[~torch.isfinite(out.log_p).cpu().numpy()]
    found = [name for name, path in zip(names, out.forest.paths, strict=True) if np.isin(path, bad).any()]
    return found or names


def _only(batch: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = batch
    return item
