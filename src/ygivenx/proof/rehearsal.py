"""One training step of a trainer, probed, that leaves no trace: no update, no random number, no state."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..errors import ConfigError, LossError
from .evidence import Denominator, Evaluation, ObservedRow
from .probing import Probe, probe

EVALUATION_BATCHES = 4


@dataclass(frozen=True)
class Rehearsal:
    """What one optimiser step would train.

    batches: the collated micro-batches, as the model was fed; empty where they are no mappings.
    """

    probe: Probe
    batches: list[dict[str, Any]]
    evaluation: Evaluation | None


def rehearse(trainer: Any) -> Rehearsal:
    """Run one step of a transformers trainer (all its micro-batches, no update) inside a probe.

    Goes through the trainer's own data loader, collator, `training_step` and evaluation loop, so that
    overridden methods count. Afterwards the model, gradients, optimiser, random states, accelerator and the
    trainer's attributes are what they were. Raises ConfigError for a trainer without training data, LossError if the
    loss depends on nothing that is trained.
    """
    if getattr(trainer, "train_dataset", None) is None:
        raise ConfigError("the trainer has no train_dataset", fix="audit the rows or a batch instead")
    with untouched(trainer):
        quieten(trainer)
        _begin_as_train_does(trainer)
        steps = trainer.args.gradient_accumulation_steps
        loader = trainer.get_train_dataloader()
        batches, items = trainer.get_batch_samples(iter(loader), steps, trainer.args.device)
        # Trainers that generate collate a list of prompts.
        kept = [dict(b) if isinstance(b, Mapping) else {} for b in batches]
        trainer.current_gradient_accumulation_steps = len(batches)
        trainer.model.zero_grad(set_to_none=True)
        with probe(trainer.model) as probed:
            if trainer.accelerator.scaler is not None:  # float16
                probed.loss_scale = trainer.accelerator.scaler.get_scale()
            probed.temperature = getattr(trainer, "temperature", None) or 1.0  # TRL's that generate
            for batch in batches:
                with probed.micro_batch(), _named_error():
                    trainer.training_step(trainer.model, batch, items)
        # Without labels the trainer divides by rules of its own, as ours does.
        evaluation = _evaluation(trainer) if all("labels" in b for b in kept) else None
    return Rehearsal(probed, kept, evaluation)


@contextlib.contextmanager
def _named_error() -> Iterator[None]:
    """A backward pass of which torch says that nothing in it is trained ends by an error that says what that means."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise LossError(
            "the loss depends on nothing that is trained",
            why="no trainable parameter takes part in it, so train() ends here, too",
            fix="unfreeze what is to be trained: PeftModel.from_pretrained(..., is_trainable=True); or, where "
            "checkpointing cuts adapters off frozen embeddings, model.enable_input_require_grads()",
        ) from error


def unrehearsed(trainer: Any) -> list[str]:
    """What train() would do beside, that the gradient of its steps depends on."""
    args = trainer.args
    changes = {
        "NEFTune's noise": args.neftune_noise_alpha is not None,
        "Liger's kernels": args.use_liger_kernel,
        "model_init's new model": trainer.model_init is not None,
    }
    return [name for name, used in changes.items() if used]


def _begin_as_train_does(trainer: Any) -> None:
    """What train() does before its first step that the gradient depends on: placement, checkpointing, autocast."""
    trainer.is_in_train = True  # an evaluation inside train() doesn't cast the model
    args, model, accelerator = trainer.args, trainer.model, trainer.accelerator
    if (args.fp16_full_eval or args.bf16_full_eval) and not trainer.is_model_parallel:
        trainer._move_model_to_device(model, args.device)
    kind = (
        "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    )  # before transformers 5.23
    if getattr(args, f"{kind}_checkpointing"):
        options = dict(getattr(args, f"{kind}_checkpointing_kwargs") or {})
        own = {k: options.pop(k) for k in ("every_n_layers", "offload") if k in options}
        enable = getattr(model, f"{kind}_checkpointing_enable")
        enable(**{f"{kind}_checkpointing_kwargs": options or None}, **own)
    if accelerator.native_amp and not hasattr(model, "_original_forward"):
        accelerator.prepare_model(model, evaluation_mode=True)


def denominators(steps: list[ObservedRow], *, gather: bool) -> list[Denominator]:
    """The weight per trained token of each micro-batch; `gather`: of all ranks, which all of them have to call.

    Where the rows give weights of their own, per unit of theirs.
    """
    distributed = gather and torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    own = []
    for number in sorted({s.micro_batch for s in steps}):
        members = [s for s in steps if s.micro_batch == number and s.trained.any()]
        if members:
            units = np.concatenate(
                [(s.weight / np.where(s.expected > 0, s.expected, 1))[s.trained] for s in members]
            )
            # The median: a few tokens may be misread, and rows with weights of their own may vary.
            median = float(np.median(units))
            uniform = bool(np.mean(np.abs(units / median - 1) < 0.05) > 0.95) if median else False
            total = float(sum(s.weight[s.trained].sum() for s in members))
            own.append(Denominator(rank, number, len(units), median, total, uniform))
    if not distributed:
        return own
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return [d for ranks in everyone for d in ranks]


@contextlib.contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Put back, whatever happens inside, all that a step without an update can change."""
    model, accelerator = trainer.model, trainer.accelerator
    # What a step adds to in place: TRL's metrics and completions, our own meter.
    counters = {
        k: copy.deepcopy(vars(trainer)[k]) for k in ("_metrics", "_logs", "meter") if k in vars(trainer)
    }
    # The tensors themselves, not copies: no update is made, so only what `.data` and `.grad` point to can change.
    parameters = [(p, p.data, p.grad) for p in model.parameters()]
    owners = [trainer, accelerator, *model.modules()]
    owners += [accelerator.scaler] if accelerator.scaler is not None else []
    attributes = [(owner, _shallow(owner)) for owner in owners]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()
    sync = dict(accelerator.gradient_state._shared_state)
    references = list(accelerator.gradient_state.dataloader_references)
    try:
        yield
    finally:
        for owner, kept in attributes:
            _restore(owner, kept)
        vars(trainer).update(counters)
        for p, data, gradient in parameters:
            if (p.dtype, p.device) != (data.dtype, data.device):
                p.data = data
            p.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(states[3])
        accelerator.gradient_state._shared_state.update(sync)
        accelerator.gradient_state.dataloader_references = references


Attributes = dict[str, tuple[Any, Any]]


def _shallow(owner: Any) -> Attributes:
    """The attributes of an object, and what its lists, sets and mappings (a module's hooks) hold."""
    return {
        k: (v, copy.copy(v) if isinstance(v, dict | list | set) else None) for k, v in vars(owner).items()
    }


def _restore(owner: Any, kept: Attributes) -> None:
    # Attributes that came with the step go, and those that were there are the same objects with the same content.
    vars(owner).clear()
    for name, (value, content) in kept.items():
        vars(owner)[name] = value
        if isinstance(content, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)


def quieten(trainer: Any) -> None:
    """No callback, so no progress bar and no logger, hears of the rehearsal; the one left warns if it is missing."""
    flow = [DefaultFlowCallback()]
    trainer.callback_handler = CallbackHandler(flow, trainer.model, trainer.processing_class, None, None)


def _evaluation(trainer: Any) -> Evaluation | None:
    """The evaluation loss of a few batches as the trainer reports it and as a mean over trained tokens."""
    dataset = trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    few = range(min(len(dataset), EVALUATION_BATCHES * trainer.args.per_device_eval_batch_size))
    part = dataset.select(few) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, few)
    loader = trainer.get_eval_dataloader(part)
    reported = trainer.evaluation_loop(loader, "audit", prediction_loss_only=True).metrics.get("eval_loss")
    trainer.model.eval()
    # Once more, batch by batch, so that their losses can be weighed by their tokens.
    losses, tokens = [], []
    for batch in loader:
        if "labels" not in batch:
            return None
        tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
        losses.append(float(trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)[0]))
    if reported is None or not sum(tokens):
        return None
    used = [(loss, n) for loss, n in zip(losses, tokens, strict=True) if n]
    return Evaluation(float(reported), sum(loss * n for loss, n in used) / sum(tokens))
