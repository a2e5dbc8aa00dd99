"""The logit head of a model: what it multiplies, and what is done to the product."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import ModelError
from ..head.logit_head import LogitHead
from . import memory
from .adapters import product
from .families import PROVEN, config_of, decoder_of, feed_sequences


def head_of(model: nn.Module) -> LogitHead:
    """The head of a causal language model, for `selective_cross_entropy`.

    A LoRA on it is part of its weight, with gradients. Soft cap and scale are read from the config; where the family
    isn't a proven one they are checked once against the model's own logits. Raises ModelError without a head, or if
    it does more than `LogitHead` says.
    """
    return LogitHead(*product(_head_layer(model)), *softcap_and_scale(model))


def softcap_and_scale(model: nn.Module) -> tuple[float | None, float]:
    """What is done to the product of hidden states and head; see `LogitHead`. Raises ModelError like `head_of`."""
    if _is_proven(model):
        return _named_softcap(config_of(model)), 1.0
    return _measured(model)[:2]


def _is_proven(model: Any) -> bool:
    """By the config of the whole model: Gemma 3 with images has the text config of Gemma 3, but no soft cap."""
    return model.config.model_type in PROVEN


def _named_softcap(config: Any) -> float | None:
    return next((cap for cap in (getattr(config, n, None) for n in _SOFTCAPS) if cap), None)


def _head_layer(model: Any) -> Any:
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no language-model head", fix="load it as a causal LM")
    return layer


# What configs call the soft cap, and the factor of the logits. One family multiplies by what another divides by under
# the same name.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class _Measured(NamedTuple):
    """What is done to the product, and whether the model makes something else of hidden states before its head."""

    softcap: float | None
    scale: float
    prepares: bool


_known: WeakKeyDictionary[nn.Module, _Measured] = WeakKeyDictionary()


def head_input(model: Any, hidden: Tensor) -> Tensor:
    """What the head reads [n, H'] where the decoder gives hidden [n, H]: for most models the same."""
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None or _is_proven(model):
        return hidden
    return _prepared(model, hidden[None])[0] if _measured(model).prepares else hidden


def _measured(model: Any) -> _Measured:
    if model not in _known:
        with precisely(model, _head_layer(model).weight.device):
            _known[model] = _measure(model, LogitHead(*product(_head_layer(model))), config_of(model))
    return _known[model]


@contextmanager
def precisely(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, weights in half precision are float32, where they fit into half of the memory.

    Rounding, and experts that it chooses otherwise, can change more in half precision than mixed branches would, or
    another soft cap.
    """
    parameters = list(model.parameters())
    plain = all(type(p.data) is Tensor and p.is_floating_point() for p in parameters)
    half = [p for p in parameters if p.dtype in (torch.float16, torch.bfloat16)]
    if not plain or 4 * sum(p.numel() for p in half) > memory.total(device) // 2:
        half = []
    kept = [p.data for p in half]
    try:
        for p in half:
            p.data = p.data.float()
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for p, data in zip(half, kept, strict=True):
            p.data = data


@torch.no_grad()
def _measure(model: Any, head: LogitHead, config: Any) -> _Measured:
    """The soft cap and the factor, none or what the config names, with which `head` gives the model's own logits."""
    ids = torch.arange(4, device=head.weight.device)[None] % config.vocab_size
    training = model.training
    model.eval()
    try:
        hidden = feed_sequences(decoder_of(model), ids)
        theirs = _logits(model, ids)
        for prepares, softcap in itertools.product(
            (False, True), dict.fromkeys((_named_softcap(config), None))
        ):
            raw = head.product(_prepared(model, hidden) if prepares else hidden).double()
            scale = _scale(replace(head, softcap=softcap), raw, theirs, config)
            if scale is not None:
                return _Measured(softcap, scale, prepares)
    finally:
        model.train(training)
    raise ModelError(
        "its logits aren't its head's product with the last hidden states",
        where=type(model).__name__,
        why="neither 1 nor a factor in its config makes them equal, so log-probabilities would be wrong",
        fix="use a model of a proven family: " + ", ".join(sorted(PROVEN)),
    )


def _logits(model: Any, ids: Tensor) -> Tensor:
    try:
        out = model(input_ids=ids)
    except Exception as error:
        raise ModelError(
            f"its own forward fails with {type(error).__name__}: {error}", where=type(model).__name__,
            why="its logits are compared once with its head's product", fix="make model(input_ids=...) work first",
        ) from error  # fmt: skip
    logits: Tensor = out[0] if isinstance(out, tuple) else out.logits
    return logits.double()


def _scale(head: LogitHead, raw: Tensor, theirs: Tensor, config: Any) -> float | None:
    if raw.shape != theirs.shape:
        return None
    named = [float(v) for v in (getattr(config, n, None) for n in _SCALES) if v]
    for scale in [1.0, *named, *(1 / v for v in named)]:
        z, _ = replace(head, scale=scale).from_product(raw)
        # The same products on the same numbers: all that differs is the rounding of the scale.
        if (z - theirs).norm() <= 4 * torch.finfo(head.weight.dtype).eps * theirs.norm():
            return scale
    return None


class _Reached(Exception):
    """The head was reached."""


def _prepared(model: Any, hidden: Tensor) -> Tensor:
    """What the model's own forward hands to its head, if its decoder gives `hidden` [1, n, H].

    ModernBERT has a layer and a norm between them, Inkling a factor. The decoder's forward and the head are replaced
    for the one call; no model code is touched.
    """
    decoder, reached = decoder_of(model), list[Tensor]()

    def give(*_args: Any, **_options: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def stop(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        reached.append(inputs[0])
        raise _Reached

    own, hook = decoder.__dict__.get("forward"), _head_layer(model).register_forward_pre_hook(stop)
    decoder.forward = give
    try:
        model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device))
    except _Reached:
        pass
    except Exception:  # it wants more of its decoder than hidden states: then they aren't what the head reads
        return hidden
    finally:
        hook.remove()
        del decoder.forward
        if own is not None:
            decoder.forward = own
    return reached[0] if reached else hidden
