"""What makes a run itself: a checkpoint of one that would go another way isn't resumed from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError

FILE, STATE = "ygivenx.json", "trainer_state.json"
# Everything that an update depends on. The optimiser's and the scheduler's saved states bring their old values back,
# so that a changed one would be ignored if it weren't refused.
_SETTINGS = (
    "seed", "gradient_accumulation_steps", "world_size", "optim", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16",
)  # fmt: skip
# Schedules that don't look at the end of the run: the way there is the same for a longer one.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


def settings(args: Any) -> dict[str, Any]:
    """The settings of a run by name; its length too, where the learning rate depends on that."""
    told = {name: _plain(getattr(args, name)) for name in _SETTINGS}
    if told["lr_scheduler_type"] in _ENDLESS and not 0 < args.warmup_steps < 1:
        return told
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return {**told, "length": length}


def trained(model: nn.Module) -> dict[str, Any]:
    """How many parameters are trained, and the types of all: LoRA's rank and the model's dtype show in them."""
    parameters = list(model.parameters())
    return {
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
    }


def remember(directory: Path, told: Mapping[str, Any]) -> None:
    """Write them beside a checkpoint's other files."""
    (directory / FILE).write_text(json.dumps(told))


def recalled(directory: Path) -> dict[str, Any]:
    """What `remember` wrote. Raises CheckpointError if that isn't there."""
    try:
        told = json.loads((directory / FILE).read_text())
    except (OSError, ValueError) as error:
        why = "another trainer wrote this checkpoint" if isinstance(error, OSError) else str(error)
        raise CheckpointError("its run isn't known", where=str(directory / FILE), why=why) from error
    return dict(told)


def steps_done(directory: Path) -> int:
    """How many optimiser steps a checkpoint has behind it."""
    return int(json.loads((directory / STATE).read_text())["global_step"])


def same(told: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError, naming what changed, unless a checkpoint with these settings belongs to this run."""
    changed = [k for k, v in now.items() if told.get(k) != v]
    if not changed:
        return
    said = [k if k == "packs" else f"{k} {told.get(k)} → {now[k]}" for k in changed]
    raise CheckpointError(
        f"it belongs to another run: {', '.join(said)} changed",
        where=str(where),
        why="what follows would differ from the uninterrupted run"
        + (" (packs are rows as the encoder's options make them)" if "packs" in changed else ""),
        fix="use the same data and settings, or another output directory",
    )


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # of enums
