"""The plan of one forward pass: which nodes see which, and by which route that is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, nearest
from ..forest import Ints

ROUTES = ("auto", "dense", "blocks", "flex", "plain")

KeysValues = dict[nn.Module, tuple[Tensor, Tensor]]  # by attention layer, each [1, heads, tokens, D]


@dataclass
class Plan:
    """How one forward pass attends: handed to the model as a keyword argument, read in every layer.

    end, depth: int64 [K], of the nodes that can be seen; the last K - first of them are the queries. Where
    first > 0 the model is fed one chunk of a longer forest, and `past` has the keys and values of the path
    that leads to it. fresh: the chunk's own, put there by the layers if it isn't None. layers: the attention
    layers that asked so far. made: masks and blocks by window.
    """

    end: Ints
    depth: Ints
    route: str
    device: torch.device
    first: int = 0
    past: KeysValues = field(default_factory=dict)
    fresh: KeysValues | None = None
    layers: set[nn.Module] = field(default_factory=set)
    made: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, end: Ints, depth: Ints, device: torch.device, route: str = "auto", first: int = 0) -> Plan:
        if route not in ROUTES:
            raise ConfigError(
                f"unknown route {route!r}{nearest(route, ROUTES)}", fix=f"use one of {', '.join(ROUTES)}"
            )
        plain = not first and bool((end == len(end)).all())
        if route == "plain" and not plain:
            raise ConfigError(
                "the route 'plain' is for one sequence; this forest branches", fix="leave route out"
            )
        if route == "auto":
            route = "plain" if plain else automatic(device)
        return cls(end, depth, route, device, first)

    def join(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values after those of the path."""
        self.layers.add(module)
        if self.fresh is not None:
            self.fresh[module] = key, value
        if not self.first:
            return key, value
        past_key, past_value = self.past[module]
        return torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)

    def once(self, make: Callable[..., Any], window: int | None) -> Any:
        """make(self, window), kept for the layers that ask later."""
        key = make, window
        if key not in self.made:
            self.made[key] = make(self, window)
        return self.made[key]


def automatic(device: torch.device) -> str:
    """The route that branching forests take on a device."""
    return {"cpu": "blocks", "cuda": "flex"}.get(device.type, "dense")
