"""What surrounds a model to train it on several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}


def inner_of(model: Any) -> Any:
    """The model inside DistributedDataParallel and FullyShardedDataParallel; any other as it is."""
    while any(kind.__name__ in WRAPPERS for kind in type(model).__mro__):
        model = model.module
    return model


def through(wrapper: nn.Module, inner: nn.Module, compute: Callable[[], T]) -> T:
    """Run `compute` inside the forward pass of a wrapped model.

    DDP and FSDP prepare gradients and gather weights in their own forward; the loss of a forest isn't the
    model's forward, so for one call it stands in for it.
    """
    if wrapper is inner:
        return compute()
    forward = inner.forward

    def stand_in() -> T:
        inner.forward = forward
        return compute()

    inner.forward = stand_in
    try:
        return wrapper()
    finally:
        inner.forward = forward
