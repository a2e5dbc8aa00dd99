"""The plan of one forward pass: which nodes see which, and by which route that is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..choices import Route, require_choice
from ..errors import ConfigError
from ..forest import Ints

CHAINS = ("varlen", "plain")  # where no two sequences begin alike

# By attention layer, each [1, heads, tokens, D]; by recurrent layer and node, the states of its convolution and its
# own after that node, [1, ...] each.
Place = nn.Module | tuple[nn.Module, int]
KeysValues = dict[Place, tuple[Tensor, Tensor]]
NO_NODES = np.zeros(0, np.int64)


def picked(values: KeysValues, nodes: Ints, places: Tensor) -> KeysValues:
    """Of these only what belongs to `nodes`, which stand at `places` among the tokens of keys and values."""
    needed, found = set(nodes.tolist()), KeysValues()
    for place, (first, second) in values.items():
        if not isinstance(place, tuple):
            found[place] = first[:, :, places], second[:, :, places]
        elif place[1] in needed:
            found[place] = first, second
    return found


def renamed(values: KeysValues, name: Callable[[int], int]) -> KeysValues:
    """With name(node) for the node of each state."""
    return {
        (place[0], name(place[1])) if isinstance(place, tuple) else place: v for place, v in values.items()
    }


@dataclass
class Plan:
    """How one forward pass attends: handed to the model as a keyword argument, read in every layer.

    end, depth: int64 [K], of the nodes that can be seen; the last K - first of them are the queries. Where
    first > 0 the model is fed one chunk of a longer forest, and `past` has the keys and values of the path
    that leads to it. fresh: the chunk's own, put there by the layers if it isn't None. kept: int64, the nodes whose
    states recurrent layers put there. layers: the layers that asked so far. built: masks and blocks by
    window. window_in_mask: a sliding window that some layer left to the model's own mask, which isn't made over a
    forest. attends_twice: whether some layer asked more than once. calls: how often layers asked.
    """

    end: Ints
    depth: Ints
    route: Route
    device: torch.device
    first: int = 0
    past: KeysValues = field(default_factory=dict)
    fresh: KeysValues | None = None
    kept: Ints = field(default_factory=lambda: NO_NODES)
    layers: set[nn.Module] = field(default_factory=set)
    built: dict[Any, Any] = field(default_factory=dict)
    window_in_mask: int | None = None
    attends_twice: bool = False
    calls: int = 0

    @classmethod
    def of(cls, end: Ints, depth: Ints, device: torch.device, route: Route = "auto", first: int = 0) -> Plan:
        require_choice("route", route, Route)
        bounds = _bounds(end, first)
        plain = bounds is not None and len(bounds) == 2
        if (route == "plain" and not plain) or (route == "varlen" and bounds is None):
            what = "one sequence" if route == "plain" else "sequences that share nothing"
            raise ConfigError(
                f"the route {route!r} is for {what}; this forest branches", fix="leave route out"
            )
        if route == "auto":
            route = "plain" if plain else automatic(device, shared=bounds is None)
        return cls(end, depth, route, device, first)

    @property
    def bounds(self) -> Ints:
        """Where sequences that share nothing begin, and where the last one ends: int64 [sequences + 1]."""
        bounds = _bounds(self.end, self.first)
        assert bounds is not None, "asked of a forest that branches"
        return bounds

    def join(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values after those of the path."""
        self.attends_twice |= module in self.layers
        self.calls += 1
        self.layers.add(module)
        if self.fresh is not None:
            self.fresh[module] = key, value
        if not self.first:
            return key, value
        past_key, past_value = self.past[module]
        return torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)

    def additive_mask(self, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, else the least number of the dtype: [1, 1, K - first, K]."""
        end = torch.from_numpy(self.end).to(self.device)
        k = torch.arange(len(end), device=self.device)
        seen = (k <= k[self.first :, None]) & (k[self.first :, None] < end)
        zeros = torch.zeros(seen.shape, dtype=dtype, device=self.device)
        return zeros.masked_fill(~seen, torch.finfo(dtype).min)[None, None]

    def cached(self, make: Callable[..., Any], window: int | None) -> Any:
        """make(self, window), kept for later layers."""
        key = make, window
        if key not in self.built:
            self.built[key] = make(self, window)
        return self.built[key]


def automatic(device: torch.device, shared: bool = True) -> Route:
    """The route that forests take on a device; shared: whether some sequences begin alike."""
    if device.type == "cuda" and not shared:
        return "varlen"
    if device.type == "cuda" and find_spec("triton"):  # what FlexAttention is compiled with
        return "flex"
    return "blocks" if device.type == "cpu" else "dense"


def _bounds(end: Ints, first: int) -> Ints | None:
    """See `Plan.bounds`; None where a node has several children, or a path leads to the first one."""
    if first:
        return None
    bounds = np.concatenate(([0], np.unique(end)))
    return bounds if np.array_equal(end, np.repeat(bounds[1:], np.diff(bounds))) else None
