"""The last layer, for the rows that are asked for: after its keys and values no token needs another's rest.

Its queries, output projection and MLP are products row by row. Hooks hand them the needed rows and put zeros in the
place of the others, which nobody reads: no model code is patched, and they are gone after the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..forest import Ints

# Families with dense MLPs whose last layer is `layers[-1]` and whose products have these names where they exist.
DENSE = {
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3",
}  # fmt: skip
ROW_BY_ROW = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
# of the rows: picking them and putting them back costs as much as sparing a third of them gains
WORTHWHILE = 0.5


@contextmanager
def only(decoder: Any, needed: Ints | None, length: int) -> Iterator[None]:
    """Within it the decoder's last hidden states [1, length, H] hold for the rows `needed` alone; None: for all.

    Nothing happens where it doesn't pay, for families that aren't in DENSE, and with gradient checkpointing, which
    runs the layer again when the hooks are gone.
    """
    if needed is None or len(needed) > WORTHWHILE * length or not _suits(decoder):
        yield
        return
    rows = torch.from_numpy(np.ascontiguousarray(needed)).to(decoder.get_input_embeddings().weight.device)
    hooks = [hook for part in _parts(decoder.layers[-1]) for hook in _hooks(part, rows, length)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _suits(decoder: Any) -> bool:
    checkpointing = decoder.training and any(
        getattr(m, "gradient_checkpointing", False) for m in decoder.modules()
    )
    return decoder.config.model_type in DENSE and not checkpointing


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    modules = dict(layer.named_modules())
    yield from (modules[name] for name in ROW_BY_ROW if name in modules)


def _hooks(part: nn.Module, rows: Tensor, length: int) -> tuple[RemovableHandle, RemovableHandle]:
    def pick(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (whole,) = inputs
        return (whole.index_select(1, rows),)

    def put_back(_module: nn.Module, _inputs: Any, found: Tensor) -> Tensor:
        return found.new_zeros(len(found), length, found.shape[-1]).index_copy(1, rows, found)

    return part.register_forward_pre_hook(pick), part.register_forward_hook(put_back)
