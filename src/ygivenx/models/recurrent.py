"""Recurrent layers and convolutions over a forest: a segment begins in the state in which its parent ended.

No model code is touched: the forward of a layer is called once or a few times per level of the forest's segments,
with a cache that hands out the parents' states and keeps those of the segments, differentiable and never written in
place. Padding stands on the right of shorter segments; there the layer's own gates are closed: the state stays.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..forest import Ints
from . import lightning, scans
from .plan import Plan
from .segments import Group, levels

CLOSED = -1e4  # sigmoid, exp and softplus of it are 0, in half precision too

# By class of layer: the projections whose outputs are gates, and the attribute that says how many of the last
# outputs are, None for all. With them CLOSED a step neither lets the state decay nor adds to it.
_MAMBA2: dict[str, str | None] = {"in_proj": "num_heads"}
_DELTA: dict[str, str | None] = {"b_proj": None, "a_proj": None}
_DELTA_IN: dict[str, str | None] = {"in_proj_b": None, "in_proj_a": None}
GATES: dict[str, dict[str, str | None]] = {
    "Qwen3NextGatedDeltaNet": {"in_proj_ba": None},
    "Qwen3_5GatedDeltaNet": _DELTA_IN,
    "Qwen3_5MoeGatedDeltaNet": _DELTA_IN,
    "LaraMiniGatedDeltaNet": _DELTA_IN,
    "OlmoHybridGatedDeltaNet": _DELTA,
    "KimiLinearDeltaAttention": {"b_proj": None, "forget_gate.f_b_proj": None},
    "Glm5NextTextLinearAttention": {"b_proj": None, "forget_gate.f_b_proj": None},
    "BailingHybridDeltaAttention": {"b_proj": None, "forget_gate.f_proj": None},
    "Lfm2ShortConv": {},
    "Lfm2MoeShortConv": {},
    "Lfm3ShortConv": {},
    "Mamba2Mixer": _MAMBA2,
    "BambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
    lightning.LAYER: {},
}
ATTENDING = {"full_attention", "sliding_attention"}  # layer types without a state

CACHE_NAMES = ("cache", "cache_params", "past_key_values")  # the first since transformers 5.24
STATES = ("conv", "recurrent")
States = dict[str, Tensor]  # by one of these, [segments, ...]


def mixers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a decoder that carry a state from token to token and can be run over a forest."""
    return [m for m in decoder.modules() if type(m).__name__ in GATES.keys() | scans.LAYERS.keys()]


def begins_with_no_state(decoder: nn.Module) -> bool:
    """Whether some of its layers can't begin in a state, so that a forest can't be computed in chunks."""
    return any(type(m).__name__ in scans.LAYERS for m in decoder.modules())


def prepare(decoder: nn.Module) -> None:
    """Let these layers look for a plan among their keyword arguments; calls without one run as before.

    It stays so: gradient checkpointing runs the layers again when we are long gone. A copy of the model is prepared,
    too, since a partial of a bound method is copied with what it is bound to.
    """
    for mixer in mixers(decoder):
        own = mixer.__dict__.get("forward")
        if not (isinstance(own, partial) and own.func is _forward):
            mixer.forward = partial(_forward, mixer, mixer.forward)


def expected_layers(decoder: nn.Module, config: Any) -> int:
    """How many layers and parts of layers have to know which tokens stand on one path."""
    count = len(mixers(decoder))
    kinds = getattr(config, "layer_types", None) or ()
    if not count:
        return int(config.num_hidden_layers)
    return count + sum(bool(kind.startswith("hybrid") or kind in ATTENDING) for kind in kinds)


def _forward(
    mixer: nn.Module, stock: Callable[..., Tensor], *args: Any, ygx: Plan | None = None, **kwargs: Any
) -> Any:
    """What a layer runs: over the forest of the plan, if there is one."""
    plan = ygx or scans.current_plan.get()
    if plan is None:
        return stock(*args, **kwargs)
    plan.layers.add(mixer)
    # Families pass hidden states by place or by name, and as the first.
    hidden = next(iter(inspect.signature(stock).bind(*args, **kwargs).arguments.values()))
    if type(mixer).__name__ in scans.LAYERS:
        return scans.over_forest(mixer, hidden, plan)
    if type(mixer).__name__ == lightning.LAYER:
        return over_forest(mixer, partial(lightning.attended, mixer), hidden, plan), None
    return over_forest(mixer, stock, hidden, plan)


def carried(decoder: nn.Module, plan: Plan) -> AbstractContextManager[None]:
    """Within it layers find the plan whose blocks don't pass it on."""
    return scans.carried(decoder, plan) if begins_with_no_state(decoder) else nullcontext()


def over_forest(mixer: nn.Module, stock: Callable[..., Tensor], hidden: Tensor, plan: Plan) -> Tensor:
    """The layer's output [1, N, H] for hidden [1, N, H], each segment from its parent's state on."""
    accepted = inspect.signature(stock).parameters
    cache_name = next(name for name in CACHE_NAMES if name in accepted)
    tree = plan.cached(levels, None)
    found, states = list[Tensor](), _past(mixer, plan, tree.path)
    # Segments of a level have equally many above them, so their parents' states are all there: a call or a few for
    # each level, not one for each segment.
    for level in tree.groups:
        ended = list[States]()
        for group in level:
            cache = SegmentCache(group, states)
            with _idle(mixer, group.padding):
                out = stock(hidden[0][group.index], **{cache_name: cache if cache.is_requested else None})
            found.append(out.flatten(0, 1).index_select(0, group.places))
            ended.append(cache.ended)
            _keep(mixer, plan, group, cache.ended)
        states = _joined(ended)
    return torch.cat(found).index_select(0, tree.order)[None]


def _joined(parts: Iterable[States]) -> States:
    some = [states for states in parts if states]
    return {key: torch.cat([states[key] for states in some]) for key in some[0]} if some else {}


def _past(mixer: nn.Module, plan: Plan, path: Ints) -> States:
    """The states after nodes of the path that leads to a chunk."""
    return _joined(
        {kind: state for kind, state in zip(STATES, plan.past[mixer, node], strict=True) if state.numel()}
        for node in path.tolist()
    )


def _keep(mixer: nn.Module, plan: Plan, group: Group, ended: States) -> None:
    """Put the states that later chunks begin in where the plan asks for them."""
    if plan.fresh is None or not len(plan.kept):
        return
    is_requested = set(plan.kept.tolist())
    for i, node in enumerate(group.last):
        if plan.first + node in is_requested:
            conv, state = (ended[k][i : i + 1] if k in ended else None for k in STATES)
            none = torch.zeros(0, device=plan.device)
            plan.fresh[mixer, plan.first + node] = (
                none if conv is None else conv,
                none if state is None else state,
            )


@contextmanager
def _idle(mixer: Any, padding: Tensor | None) -> Iterator[None]:
    """Within it the layer's state stays what it is wherever padding, bool [B, T], is true."""
    if padding is None:
        yield
        return
    limit: tuple[float, float] = getattr(mixer, "time_step_limit", None) or (0.0, math.inf)
    least = limit[0]
    if least > 0:  # a step that can't be 0 isn't idle: the bound is kept by `_close`, where no padding stands
        mixer.time_step_limit = (0.0, limit[1])
    hooks = [
        mixer.get_submodule(name).register_forward_hook(
            partial(_close, padding, getattr(mixer, count) if count else None, _floor(mixer, least))
        )
        for name, count in GATES[type(mixer).__name__].items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if least > 0:
            mixer.time_step_limit = limit


def _floor(mixer: Any, least: float) -> Tensor | None:
    """What softplus(floor + bias) = least holds for, [heads]; None without a least step."""
    return None if least <= 0 else math.log(math.expm1(least)) - mixer.dt_bias


def _close(
    padding: Tensor, count: int | None, floor: Tensor | None, _module: nn.Module, _inputs: Any, out: Tensor
) -> Tensor:
    """A projection's output [B, T, n] with its last `count` numbers, or all, CLOSED at padding, else at least floor."""
    count = count or out.shape[-1]
    gates = out[..., -count:]
    if floor is not None:
        gates = torch.maximum(gates, floor.to(gates.dtype))
    return torch.cat((out[..., :-count], gates.masked_fill(padding[..., None], CLOSED)), -1)


class SegmentCache:
    """What a layer takes for transformers' cache: the states that the segments of one call begin and end in."""

    def __init__(self, group: Group, before: States) -> None:
        self.group = group
        self.ended: States = {}
        begins = group.begins
        self._begin = {} if begins is None else {k: v.index_select(0, begins) for k, v in before.items()}

    @property
    def is_requested(self) -> bool:
        """Whether any of the segments has one above or below."""
        return self.group.begins is not None or len(self.group.kept) > 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of the convolution, [B, channels, kernel]; None at the beginning of sequences."""
        return self._begin.get("conv")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """[B, ...]; None at the beginning of sequences."""
        return self._begin.get("recurrent")

    def is_recording_past(self, layer_idx: int) -> bool:
        """Yes: it keeps the layer from writing into the state of the convolution."""
        return True

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int, **_: Any
    ) -> Tensor:
        """The inputs [B, channels, T] behind those that they continue."""
        before = self.get_conv_state(layer_idx, state_idx)
        # The convolution reads its last inputs, which lie in the parent segment where this one is young.
        whole = conv_states if before is None else torch.cat((before, conv_states), -1)
        if len(self.group.kept):
            shown = nn.functional.pad(conv_states, (conv_kernel_size, 0)) if before is None else whole
            shown = shown.index_select(0, self.group.kept)
            last = self.group.lengths[self.group.kept, None] + torch.arange(
                conv_kernel_size, device=shown.device
            )
            last = last[:, None].expand(-1, shown.shape[1], -1)
            self.ended["conv"] = shown.gather(2, last)
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Keeps the states in which the segments ended."""
        if len(self.group.kept):
            self.ended["recurrent"] = recurrent_states.index_select(0, self.group.kept)
        return recurrent_states
