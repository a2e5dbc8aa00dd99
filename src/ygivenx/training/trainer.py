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
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_utils import TrainOutput

from ..choices import Denominator, require_choice
from ..encoded import EncodedRows
from ..errors import ConfigError, LossError
from ..forest import MAX_TOKENS, Forest
from ..models import memory
from ..models.position_limits import PositionLimits
from ..models.sharing import describe_routes
from ..objective import Loss, loss
from . import checkpoint, runs
from .evaluation import evaluate, rates
from .packs import EpochOrder, Packs, plan_of
from .precision import RoundedUpdates, refuse_float16_weights

logger = logging.getLogger(__name__)


@dataclass
class Meter:
    """What went through since the last log line."""

    since: float = field(default_factory=time.perf_counter)
    weight: float = 0.0
    trained: int = 0
    targets: int = 0
    log_p: float = 0.0
    distinct: int = 0
    total: int = 0

    def add(self, forest: Forest, log_p: torch.Tensor) -> None:
        self.targets += len(log_p)
        self.log_p += float(log_p.detach().sum())
        self.weight += float(forest.weight.sum(dtype=np.float64))
        self.trained += sum(int((forest.weight[p] > 0).sum()) for p in forest.paths)
        self.distinct += len(forest.token)
        self.total += sum(map(len, forest.paths))

    def read(self) -> dict[str, float]:
        """Rates since the last reading; starts anew."""
        seconds = time.perf_counter() - self.since
        if not self.total:
            return {}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        readings = {
            "y_tokens_per_second": round(self.trained / seconds, 1),
            "trained_share": round(self.trained / self.total, 4),
            "sharing": round(self.total / self.distinct, 3),
            "log_p_y_per_token": round(self.log_p / max(self.targets, 1), 6),
            "peak_memory_mib": round(memory.peak() / 2**20),
            "memory_share": round(memory.peak() / memory.total(device), 3),
        }
        vars(self).update(vars(Meter()))
        return readings


# Settings that forests have no place for: what leaves each alone, why it could do nothing here, and what does.
_UNUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "auto_find_batch_size": ((False,), "one pack is one micro-batch, and can't be halved", "lower max_tokens"),
    "average_tokens_across_devices": (
        (True,), "the denominator is the weight of the step on all ranks", "leave it at True"
    ),
    "bf16_full_eval": ((False,), "evaluation computes as the model is", "load the model in bfloat16"),
    "fp16_full_eval": ((False,), "evaluation computes as the model is", "load the model in float16"),
    "ignore_data_skip": ((False,), "a resumed run would see its packs again", "leave it out"),
    "label_smoothing_factor": ((0,), "the loss is −log p of the targets and of nothing else", "leave it out"),
    "neftune_noise_alpha": (
        (None, 0), "its noise is made for the length of a row, and a pack holds many that share tokens", "leave it out"
    ),
    "torch_compile": ((False,), "it compiles the model's own forward, which isn't called here", "leave it out"),
    "train_sampling_strategy": (
        ("random",), "packs are shuffled by (seed, epoch), and padding there is none", "leave it out"
    ),
}  # fmt: skip


class _LastStepIsLogged(transformers.TrainerCallback):
    """A run that ends between two log entries says how it ended."""

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **_: Any,
    ) -> None:
        if args.logging_strategy != "no" and state.global_step >= state.max_steps:
            control.should_log = True


def refuse_unused(args: transformers.TrainingArguments, given: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError for what would be ignored and change what is trained."""
    for name in ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if (given or {}).get(name) is not None:
            raise ConfigError(
                f"{name} is not used by ygivenx.Trainer", why="its batches are forests", fix="leave it out"
            )
    for name, (idle, why, fix) in _UNUSED.items():
        value = getattr(args, name, idle[0])
        if value not in idle:
            raise ConfigError(f"{name}={value!r} is not used by ygivenx.Trainer", why=why, fix=fix)
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process",
            why="torch's DataParallel splits a batch into rows, and a forest has none",
            fix=f"torchrun --nproc_per_node {args.n_gpu}, or CUDA_VISIBLE_DEVICES=0 for one of them",
        )


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
        max_tokens: int = MAX_TOKENS,
        denominator: Denominator = "tokens",
        notes: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        require_choice("denominator", denominator, Denominator)
        args = args or transformers.TrainingArguments("trainer_output")
        refuse_unused(args, kwargs)
        args.remove_unused_columns = False
        if args.per_device_train_batch_size not in (1, 8):  # 8 is the default
            logger.warning(
                "per_device_train_batch_size=%d has no meaning here: a pack of max_tokens=%d is one micro-batch",
                args.per_device_train_batch_size,
                max_tokens,
            )
        args.per_device_train_batch_size = 1
        args.logging_nan_inf_filter = False
        args.restore_callback_states_from_checkpoint = True  # early stopping counts
        self.max_tokens, self.denominator = max_tokens, denominator
        packs = None if train_dataset is None else self._packs(train_dataset, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=_only,
            train_dataset=packs,
            eval_dataset=None if eval_dataset is None else self._held_out(eval_dataset, args),
            **kwargs,
        )
        refuse_float16_weights(self.model)
        if args.fsdp and self.accelerator.distributed_type != DistributedType.FSDP:
            raise ConfigError(
                f"fsdp is given, and accelerate would train as {self.accelerator.distributed_type}",
                why="it shards over several GPUs alone, and would leave the option out without a word",
                fix="torchrun --nproc_per_node N on a machine with N GPUs; or leave fsdp out",
            )
        self.add_callback(_LastStepIsLogged)
        self.add_callback(RoundedUpdates)
        self.meter = Meter()
        self.control: transformers.TrainerControl
        self._staging: Path | None = None
        self._epoch = 0  # that the run begins in
        self._notes, self._published = dict(notes or {}), set[str]()
        self._run: dict[str, Any] = {}

    def _held_out(self, data: Any, args: transformers.TrainingArguments) -> Any:
        """Evaluation data, to be read again and again. Raises ConfigError if there is nothing to read."""
        if isinstance(data, dict):
            return {name: self._held_out(part, args) for name, part in data.items()}
        kept = EncodedRows.of(data)
        if not len(kept):
            raise ConfigError("eval_dataset is empty", fix="give it Examples or Sequences, or leave it out")
        return kept

    def _packs(self, items: Iterable[Any], args: transformers.TrainingArguments) -> Any:
        packs = Packs(items, max_tokens=self.max_tokens, seed=data_seed(args), denominator=self.denominator)
        if not len(packs):
            raise ConfigError(
                "nothing to train on: no pack has a token with a weight", fix="look at the rejected rows"
            )
        packs.fill(args.world_size)
        return packs

    # -- the loss ------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        packs = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(len(packs), data_seed(self.args), self._epoch)

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
        with self.accelerator.autocast():
            # Ranks average their gradients, and W already counts all ranks: undo the average.
            weight = None if num_items_in_batch is None else float(num_items_in_batch) / self.args.world_size
            out = self._loss(model, inputs, weight)
        self._refuse_non_finite(out, inputs["names"])
        self.meter.add(inputs["forest"], out.log_p)
        self._value = out.value.detach()
        if out.value.requires_grad and self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            out.value.register_hook(self._undivided)
        return (out.value, {"log_p": out.log_p}) if return_outputs else out.value

    def _loss(self, model: nn.Module, inputs: dict[str, Any], denominator: float | None) -> Loss:
        return loss(model, inputs["forest"], denominator=denominator)

    def _undivided(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of a micro-batch's loss, which is divided already: 1, or the scale of float16.

        Some releases of transformers (5.2) divide it again by the number of micro-batches. What arrives here is
        measured in each backward pass, so it is right whoever divides.
        """
        scaler = self.accelerator.scaler
        expected = torch.full_like(grad, 1.0 if scaler is None else scaler.get_scale())
        return grad if torch.equal(grad, expected) else expected

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As transformers'; the loss that is logged is the one that was computed, whoever divides afterwards."""
        super().training_step(model, inputs, num_items_in_batch)
        return self._value

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
        return 6 * len(inputs["forest"].fed) * sum(int(p.numel()) for p in self.model.parameters())

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Tokens of all sequences, on all ranks: transformers looks for `input_ids`."""
        if self.args.include_num_input_tokens_seen != "no":
            here = torch.tensor(inputs["forest"].total, device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(here).sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.meter.read()}
        super().log(logs, start_time)

    # -- evaluation ----------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Nats per token of y (`conditional_nats`) and of x (`marginal_nats`), apart, and the weighted loss."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        data = self.eval_dataset if eval_dataset is None else self._held_out(eval_dataset, self.args)
        if isinstance(data, dict):
            many = [self.evaluate(d, ignore_keys, f"{metric_key_prefix}_{name}") for name, d in data.items()]
            return {k: v for metrics in many for k, v in metrics.items()}
        if data is None:
            raise ConfigError("no eval_dataset", fix="give the Trainer one, or pass it to evaluate()")
        started = time.perf_counter()
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self._measured(data).items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self, data: Any) -> dict[str, float]:
        sums = evaluate(
            self.model,
            data,
            max_tokens=self.max_tokens,
            rank=self.args.process_index,
            ranks=self.args.world_size,
            denominator=self.denominator,
        )
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        return rates(sums)

    def predict(self, *_: Any, **__: Any) -> Any:
        """Raises ConfigError: no logits are made here."""
        raise ConfigError(
            "ygivenx.Trainer has no predict()",
            why="it would give logits of every token, which are never made here",
            fix="evaluate(), yx.score, yx.ledger, or the model's own generate()",
        )

    # -- checkpoints ---------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run, as transformers counts them."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return math.ceil(float(self.args.num_train_epochs) * self._steps_of_an_epoch)

    @property
    def _steps_of_an_epoch(self) -> int:
        packs: int = len(self.train_dataset) // self.args.world_size
        return -(-packs // int(self.args.gradient_accumulation_steps))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers', and `resume_from_checkpoint="auto"`: the newest complete one, or a fresh start.

        A run that is finished already only gets the weights and the log of its last checkpoint back; the training
        loss of its output is NaN.
        """
        if self.train_dataset is None:
            raise ConfigError("no train_dataset", fix="give the Trainer one")
        path = checkpoint.start(Path(self.args.output_dir), resume_from_checkpoint, self._published)
        return self.train_from(path, **kwargs)

    def train_from(self, path: Path | None, **kwargs: Any) -> Any:
        """`train` from what `checkpoint.start` has found, whose files it has read and hashed already."""
        self._run = self._identity()  # before the model is wrapped or sharded
        self._epoch, self.meter = 0, Meter()
        model = self.accelerator.unwrap_model(self.model)
        logger.info("%s; %s", self.train_dataset, describe_routes(model))
        self._refuse_unreadable(model)
        if path is None:
            return super().train(**kwargs)
        before = runs.recalled(path)
        runs.refuse_another_run(before, self._run, path)
        with checkpoint.reading(path):
            done = transformers.TrainerState.load_from_json(str(path / runs.STATE))
            done.global_step = int(done.global_step)
        if done.global_step >= self.steps:  # transformers looks at its limit after a step
            return self._finished(path, done)
        runs.refuse_model_alone(before, path)
        self._epoch = done.global_step // self._steps_of_an_epoch
        return super().train(resume_from_checkpoint=str(path), **kwargs)

    def _refuse_unreadable(self, model: nn.Module) -> None:
        """Raise ModelError by the row's name, before any step, for what the model can't read."""
        limits, held_out = PositionLimits.of(model), self.eval_dataset or {}
        held_out = held_out if isinstance(held_out, dict) else {"": held_out}
        plans = [("", self.train_dataset.rows, self.train_dataset.plan)]
        plans += [("eval_dataset, ", rows, plan_of(rows, self.max_tokens)) for rows in held_out.values()]
        for source, rows, packs in plans:
            for pack in packs if limits.unchanged else ():
                lengths = rows.length[pack]
                limits.refuse(lengths, where=source + rows.name(pack[int(lengths.argmax())]))

    def end_ranks(self) -> None:
        """Leave the process group, once nothing more of this trainer is asked for; nothing happens in a single process.

        The wrapper of the model goes first. As the group's last owner it would wait for gloo's threads while it holds
        the interpreter's lock, for which one of these threads may be waiting: a process that never ends.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _load_best_model(self) -> None:
        """As transformers', from a checkpoint whose files are what was written. Raises CheckpointError."""
        checkpoint.verify(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _finished(self, path: Path, state: transformers.TrainerState) -> TrainOutput:
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best:
            checkpoint.verify(Path(best))
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with checkpoint.reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint_dir: Any) -> None:
        with checkpoint.reading(Path(str(checkpoint_dir))):
            super()._load_optimizer_and_scheduler(checkpoint_dir)

    def _load_rng_state(self, checkpoint_dir: Any) -> None:
        with checkpoint.reading(Path(str(checkpoint_dir))):
            super()._load_rng_state(checkpoint_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' own files, written to a staging directory, sealed, then renamed into place."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = run_dir / checkpoint.STAGING
        try:
            with checkpoint.writing(run_dir / name):
                if self.is_world_process_zero():
                    checkpoint.clear(self._staging)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self._name_best(run_dir, name)
                self.accelerator.wait_for_everyone()
                ranks = 0 if self.args.save_only_model else self.args.world_size
                runs.refuse_lacking_ranks(self._staging / name, ranks)
                self.accelerator.wait_for_everyone()  # all have looked before it is renamed
                if self.is_world_process_zero():
                    self._publish(self._staging / name, run_dir / name)
            self.accelerator.wait_for_everyone()
            self._published.add(name)
        finally:
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Once it has its name: the upload goes on while the staging directory is renamed."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best(self, run_dir: Path, name: str) -> None:
        """The best checkpoint was named by its staging path: all ranks give it the one that it will have."""
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if best.name == name or best.is_dir():  # the best step isn't one that is saved, always
            self.state.best_model_checkpoint = str(best)

    def _publish(self, staged: Path, final: Path) -> None:
        self.state.save_to_json(str(staged / runs.STATE))
        runs.remember(staged, {**self._notes, **self._run, runs.MODEL_ALONE: self.args.save_only_model})
        checkpoint.seal(staged)
        checkpoint.publish(staged, final)
        step, best = self.state.global_step, self.state.best_model_checkpoint
        checkpoint.rotate(final.parent, self.args.save_total_limit, step, best)


def _culprits(out: Loss, names: list[str]) -> list[str]:
    """The sequences with a non-finite log p; all of the pack where no single one stands out."""
    bad = out.edges.nodes[~torch.isfinite(out.log_p).cpu().numpy()]
    found = [name for name, path in zip(names, out.forest.paths, strict=True) if np.isin(path, bad).any()]
    return found or names


def data_seed(args: transformers.TrainingArguments) -> int:
    """The seed of the order of rows."""
    return int(args.seed if args.data_seed is None else args.data_seed)


def _only(batch: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = batch
    return item
