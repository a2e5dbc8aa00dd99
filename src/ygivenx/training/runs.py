"""What makes a run itself: a checkpoint of one that would go another way isn't resumed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError

FILE, STATE = "ygivenx.json", "trainer_state.json"
MODEL_ALONE = "save_only_model"
# Everything that an update depends on. The optimiser's and the scheduler's saved states bring their old values back,
# so that a changed one would be ignored if it weren't refused.
_SETTINGS = (
    "seed", "data_seed", "gradient_accumulation_steps", "world_size", "optim", "optim_args", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "adam_beta1",
    "adam_beta2", "adam_epsilon", "bf16", "fp16",
)  # fmt: skip
# Schedules that don't look at the end of the run: the way there is the same for a longer one.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


def settings(args: Any) -> dict[str, Any]:
    """The settings of a run by name; its length too, where the learning rate depends on that."""
    values = {name: _plain(getattr(args, name)) for name in _SETTINGS}
    if values["lr_scheduler_type"] in _ENDLESS and not 0 < args.warmup_steps < 1:
        return values
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return {**values, "length": length}


def trained(model: nn.Module) -> dict[str, Any]:
    """How many parameters are trained, the types of all, the model's config, and what adapters' checkpoints lack."""
    parameters = list(model.parameters())
    return {
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
        **_config(model),
        **_adapters(model),
    }


# Of a model's config, what says nothing about what it computes.
_NAMES = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "id2label",
    "label2id", "output_attentions", "output_hidden_states", "return_dict", "task_specific_params",
}  # fmt: skip


def _config(model: nn.Module) -> dict[str, Any]:
    """Every key of the model's config by name: heads, activation, dropout, rotary frequencies."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    return {f"the model's {k}": _plain(v) for k, v in config.to_dict().items() if k not in _NAMES}


# Of an adapter's config, what says nothing about how it is trained.
_ASIDE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "runtime_config",
}


def _adapters(model: nn.Module) -> dict[str, Any]:
    """The settings of PEFT's adapters, and a hash of every frozen value: which model they stand on."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    settings: dict[str, Any] = {
        f"{name} adapter's {key}": _plain(value)
        for name, config in configs.items()
        for key, value in config.to_dict().items()
        if key not in _ASIDE
    }
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if not any(p.is_meta for p in frozen):  # as they are on ranks that are sent their weights
        settings["base_model"] = hash_of(frozen)
    return settings


def hash_of(tensors: Iterable[nn.Parameter]) -> str:
    """SHA-256 over all bytes of the tensors, one tensor at a time on the CPU: two seconds for a gigabyte."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def remember(directory: Path, run: Mapping[str, Any]) -> None:
    """Write them beside a checkpoint's other files."""
    (directory / FILE).write_text(json.dumps(run))


def refuse_lacking_ranks(directory: Path, ranks: int) -> None:
    """Raise CheckpointError unless each of several ranks has left the state of its random generators."""
    lacking = [r for r in range(ranks) if ranks > 1 and not (directory / f"rng_state_{r}.pth").is_file()]
    if lacking:
        raise CheckpointError(
            f"nothing of rank {', '.join(map(str, lacking))} is in it",
            where=str(directory),
            why="ranks that don't see the same output directory: a resumed run would draw other random numbers",
            fix="name a directory on a file system that all machines share",
        )


def recalled(directory: Path) -> dict[str, Any]:
    """What `remember` wrote. Raises CheckpointError if that isn't there."""
    try:
        return dict(json.loads((directory / FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        why = "another trainer wrote this checkpoint" if isinstance(error, OSError) else str(error)
        raise CheckpointError("its run isn't known", where=str(directory / FILE), why=why) from error


def steps_done(directory: Path) -> int:
    """How many optimiser steps a checkpoint has behind it. Raises CheckpointError if it doesn't say."""
    try:
        return int(json.loads((directory / STATE).read_text())["global_step"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            "its step isn't known", where=str(directory / STATE), why=repr(error)
        ) from error


def refuse_another_run(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError, naming what changed, unless a checkpoint with these settings belongs to this run."""
    now = json.loads(json.dumps(now))  # as the others came back
    changed = [k for k, v in now.items() if before.get(k) != v]
    if not changed:
        return
    changes = [k if k == "packs" else f"{k} {before.get(k)} → {now[k]}" for k in changed]
    raise CheckpointError(
        f"it belongs to another run: {', '.join(changes)} changed",
        where=str(where),
        why="what follows would differ from the uninterrupted run"
        + (" (packs are rows as the encoder's options make them)" if "packs" in changed else ""),
        fix="use the same data and settings, or another output directory",
    )


def refuse_another_base(start: Path | None, base: Mapping[str, str]) -> None:
    """Raise CheckpointError where a run began with a model of other weights; `base`: their hash by a name."""
    before = {} if start is None else recalled(start)
    if start is not None and set(base) <= set(before):
        refuse_another_run(before, base, start)


def refuse_model_alone(run: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError for a checkpoint that has no optimiser to go on with."""
    if run.get(MODEL_ALONE):
        raise CheckpointError(
            "it holds the model alone (save_only_model)",
            where=str(where),
            why="the optimiser would begin anew, and what follows differ from the uninterrupted run",
            fix="load its weights and train them in another output directory",
        )


def _plain(value: Any) -> Any:
    """What JSON can hold: an enum's value, a set's items in order, other objects by their names."""
    value = getattr(value, "value", value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
