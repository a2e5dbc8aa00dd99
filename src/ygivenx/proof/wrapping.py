"""The transformers model inside the wrappers that training puts around it, and its head."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.wrappers import innermost
from .gradients import ProbedHead

if TYPE_CHECKING:
    from torch import nn


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside DDP, FSDP, torch.compile and PEFT wrappers; raises ModelError if none."""
    seen = innermost(model)
    if not hasattr(seen, "get_output_embeddings") or seen.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} has no output embeddings",
            why="the probe reads the gradient at the output head",
            fix="pass the causal language model itself, such as trainer.model",
        )
    return seen


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled modules run as written: graphs from before a hook was there don't call it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def probed_head(model: Any, head: Any) -> ProbedHead:
    """How a head's output becomes logits; raises ModelError for a head that is sharded."""
    _refuse_sharded(model, head)
    from ..models.model import softcap_and_scale

    probed = ProbedHead(head.weight, getattr(head, "bias", None), *softcap_and_scale(model))
    if not hasattr(head, "base_layer"):
        return probed
    return replace(probed, weight=_adapted(head), unadapted=head.weight)


@torch.no_grad()
def _adapted(head: Any) -> Tensor:
    """The whole matrix [V, H] of a head with an adapter: what it makes of the identity.

    Of any linear adapter, DoRA too: other trainers have what `models.adapters.product` refuses to train.
    """
    modes = [(m, m.training) for m in head.modules()]
    head.eval()  # adapters may drop out
    try:
        product: Tensor = type(head).forward(head, torch.eye(head.weight.shape[1]).to(head.weight))
    finally:
        for module, training in modes:
            module.training = training
    if getattr(head, "bias", None) is not None:
        product = product - head.bias
    return product.T


def _refuse_sharded(model: Any, head: Any) -> None:
    """Raise ModelError where this process holds a part of the head's matrix alone."""
    weight = head.weight
    if hasattr(weight, "placements"):
        how = "a DTensor (FSDP2, tensor parallelism)"
    elif hasattr(weight, "ds_id") and not weight.numel():
        how = "partitioned by DeepSpeed ZeRO-3"
    elif weight.dim() != 2 or not weight.numel():
        how = "flattened by FSDP"
    else:
        return
    raise ModelError(
        f"the head of {type(model).__name__} is {how}",
        why="the probe reads a gradient against the whole matrix of the output head",
        fix="probe or audit the same set-up in one process, without sharding",
    )
