"""In which numbers a run keeps its weights and computes its products; what rounding does to updates."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError

logger = logging.getLogger(__name__)
SAMPLE = 4096  # values of each tensor that are compared: shares of an update are known to a percent


def multiplies_bfloat16() -> bool:
    """Whether this machine's own instructions multiply bfloat16; emulated products would only cost accuracy."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in instructions)


def refuse_float16_weights(model: nn.Module) -> None:
    """Raise ConfigError where weights in float16 would be trained.

    AdamW's eps of 1e-8 is 0 in float16, so updates are divided by nothing: the loss grows at once.
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if names:
        raise ConfigError(
            f"{len(names)} tensors would be trained in float16, {names[0]} among them",
            why="AdamW's eps is 0 in float16, and small updates are lost: the model would be destroyed",
            fix="load the model in float32; fp16=True (--dtype fp16) multiplies in float16 all the same",
        )


class RoundedUpdates(TrainerCallback):
    """Warns where 16-bit weights are too coarse for the updates of a run.

    In the first step after the warm-up it counts the weights with a gradient whose update rounds to nothing.
    `share` is what it found: None before that step, and for weights in float32.
    """

    def __init__(self) -> None:
        self.share: float | None = None
        self._before: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Keeps some values of each 16-bit weight that the step is about to change."""
        if self.share is None and state.global_step >= args.get_warmup_steps(state.max_steps):
            self._before = [_sample(p) for p in given["model"].parameters() if _coarse(p)]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Counts which of the kept values are still the same."""
        if not self._before:
            return
        optimizer = given.get("optimizer")
        states = {} if optimizer is None else optimizer.state
        same = sum(int(_lost(p, at, old, states.get(p, {})).sum()) for p, at, old in self._before)
        count = sum(len(old) for _, _, old in self._before)
        self._before, self.share = [], same / max(count, 1)
        if self.share > 0.01 and state.is_world_process_zero:
            rate = given["lr_scheduler"].get_last_lr()[0] if given.get("lr_scheduler") else args.learning_rate
            logger.warning(
                "%.0f %% of the updates round away: the weights are bfloat16 and the learning rate is %g; "
                "float32 weights with bfloat16 products (bf16=True, --dtype bf16) lose none, nor does the optimiser "
                "optim='stable_adamw' (pip install torch-optimi), which keeps what is rounded away",
                100 * self.share,
                rate,
            )


def _coarse(p: nn.Parameter) -> bool:
    return p.requires_grad and p.dtype == torch.bfloat16 and p.grad is not None


def _lost(p: nn.Parameter, at: Any, old: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
    """bool [values]: which have their old value, and nothing that Kahan's summation keeps of the update."""
    same = p.detach()[at] == old
    kept = state.get("kahan_comp")
    return same & (kept[at] == 0) if kept is not None and kept.shape == p.shape else same


def _sample(p: nn.Parameter) -> tuple[nn.Parameter, Any, torch.Tensor]:
    """A weight, where it has a gradient (at most SAMPLE places, evenly spread), and its values there."""
    assert p.grad is not None
    at = p.grad.detach().nonzero(as_tuple=True)
    step = max(1, len(at[0]) // SAMPLE)
    at = tuple(index[::step] for index in at)
    return p, at, p.detach()[at].clone()
