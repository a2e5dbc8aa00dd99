"""One training step of a trainer, probed, that leaves no trace: no update, no random number, no state."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import CallbackHandler

from ..errors import ConfigError
from .evidence import Denominator, Evaluation, Seen
from .probing import Probe, probe

EVALUATION_BATCHES = 4


@dataclass(frozen=True)
class Rehearsal:
    """What one optimiser step would train. batches: the collated micro-batches, as the model was fed."""

    probe: Probe
    batches: list[dict[str, Any]]
    evaluation: Evaluation | None


def rehearse(trainer: Any) -> Rehearsal:
    """Run one step of a transformers trainer (all its micro-batches, no update) inside a probe.

    Goes through the trainer's own data loader, collator, `training_step` and evaluation loop, so that
    overridden methods count. Afterwards weights, gradients, optimiser, random states and the trainer's
    attributes are what they were. Raises ConfigError for a trainer without training data.
    """
    if getattr(trainer, "train_dataset", None) is None:
        raise ConfigError("the trainer has no train_dataset", fix="audit the rows or a batch instead")
    with untouched(trainer):
        quieten(trainer)
        steps = trainer.args.gradient_accumulation_steps
        loader = trainer.get_train_dataloader()
        batches, items = trainer.get_batch_samples(iter(loader), steps, trainer.args.device)
        kept = [dict(b) for b in batches]
        trainer.current_gradient_accumulation_steps = len(batches)
        trainer.model.zero_grad(set_to_none=True)
        with probe(trainer.model) as probed:
            for batch in batches:
                trainer.training_step(trainer.model, batch, items)
        # Without labels the trainer divides by rules of its own, as ours does.
        evaluation = _evaluation(trainer) if all("labels" in b for b in kept) else None
    return Rehearsal(probed, kept, evaluation)


def denominators(steps: list[Seen]) -> list[Denominator]:
    """The weight per trained token of each micro-batch, on all ranks if there are several.

    Where the rows give weights of their own, per unit of theirs.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    own = []
    for number in sorted({s.micro_batch for s in steps}):
        members = [s for s in steps if s.micro_batch == number and s.trained.any()]
        if members:
            units = np.concatenate(
                [(s.weight / np.where(s.expected > 0, s.expected, 1))[s.trained] for s in members]
            )
            own.append(Denominator(rank, number, len(units), float(np.median(units))))
    if not distributed:
        return own
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return [d for ranks in everyone for d in ranks]


@contextlib.contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Put back, whatever happens inside, all that a step without an update can change."""
    model, accelerator = trainer.model, trainer.accelerator
    attributes = dict(trainer.__dict__)
    # Counters that a step adds to in place: TRL's metrics, our own meter.
    counters = {k: copy.deepcopy(attributes[k]) for k in ("_metrics", "meter") if k in attributes}
    loaders = list(accelerator._dataloaders)
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()
    sync = dict(accelerator.gradient_state._shared_state)
    references = list(accelerator.gradient_state.dataloader_references)
    try:
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(states[3])
        accelerator._dataloaders[:] = loaders
        accelerator.gradient_state._shared_state.update(sync)
        accelerator.gradient_state.dataloader_references = references
        trainer.__dict__.clear()
        trainer.__dict__.update(attributes | counters)


def quieten(trainer: Any) -> None:
    """No callback, so no progress bar and no logger, hears of the rehearsal."""
    trainer.callback_handler = CallbackHandler([], trainer.model, trainer.processing_class, None, None)


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
