"""What surrounds a model to train it on several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
SHARDED = {"FullyShardedDataParallel", "FSDPModule"}  # the latter: what `fully_shard` makes of a model


def inner_of(model: Any) -> Any:
    """The model inside DistributedDataParallel, FullyShardedDataParallel and DeepSpeed; any other as it is."""
    while _is_one_of(model, WRAPPERS):
        model = model.module
    return model


def innermost(model: Any) -> Any:
    """The model inside whatever surrounds it: wrappers with a `module`, torch.compile, PEFT."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None:
            return model
        model = inner


def sharded(model: Any) -> bool:
    """Whether a forward pass gathers weights from all ranks: each has to make as many as the others."""
    return _is_one_of(model, SHARDED)


def _is_one_of(model: Any, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(model).__mro__)


def inside_forward(model: Any, compute: Callable[[Any], T]) -> T:
    """compute(the inner model), inside the forward pass of a wrapped or sharded model.

    DDP and FSDP prepare gradients and gather weights in their own forward; the loss of a forest isn't the
    model's forward, so for one call it stands in for it.
    """
    inner = inner_of(model)
    if inner is model and not sharded(model):
        return compute(model)
    patched = inner.__dict__.get("forward")  # accelerate's, for instance

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if patched is not None:
            inner.forward = patched

    def stand_in() -> T:
        restore()
        return compute(inner)

    inner.forward = stand_in
    try:
        found: T = model()
    finally:
        restore()
    return found
