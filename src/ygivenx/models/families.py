"""Which models can be fed a forest, and feeding them.

The families in PROVEN are compared with unshared runs, gradients included, by the tests. Any other model is
compared on a small forest before its first use. What keeps a state beside attention is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..forest import Forest, Ints
from . import attention, last_layer, memory, recurrent
from .adapters import refuse_unread
from .plan import Plan, automatic
from .wrappers import inner_of

# `model_type` of the decoders' configs.
PROVEN = {
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2",
    "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "smollm3",
}  # fmt: skip
LAYER_TYPES = {"full_attention", "sliding_attention"}

_compared: WeakSet[nn.Module] = WeakSet()


def decoder_of(model: Any) -> Any:
    """The part that maps tokens to final hidden states. Raises ModelError for what isn't a causal LM."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    if decoder is None or not hasattr(decoder, "get_input_embeddings"):
        wrapped = inner_of(model) is not model
        fix = "pass the model inside it, .module" if wrapped else "load it with AutoModelForCausalLM"
        raise ModelError(f"{type(model).__name__} has no decoder", fix=fix)
    return decoder


def vocabulary(decoder: Any) -> int:
    """How many tokens have an embedding."""
    return len(decoder.get_input_embeddings().weight)


def config_of(model: Any) -> Any:
    """The config of the language model, also where a model has several."""
    return model.config.get_text_config(decoder=True)


def check(model: Any) -> None:
    """Raise ModelError for a model whose hidden states over a forest would not be those of its sequences."""
    refuse_unread(model)
    decoder, config = decoder_of(model), config_of(model)
    strange = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if strange and not recurrent.mixers(decoder):
        raise ModelError(
            f"its layers of type {', '.join(sorted(strange))} can't be computed over a forest",
            where=type(decoder).__name__,
            why="such a layer carries a state from token to token, and branches would mix theirs",
            fix="use a model whose layers are full or sliding-window attention",
        )
    accepted = inspect.signature(decoder.forward).parameters.keys()
    if "attention_mask" not in accepted or ("position_ids" not in accepted and not recurrent.mixers(decoder)):
        raise ModelError(
            f"{type(decoder).__name__} takes no positions or no mask",
            why="without them a token can't be told which path it stands on",
            fix="use a decoder-only transformer",
        )
    attention.prepare(config)
    recurrent.prepare(decoder)
    if config.model_type not in PROVEN and decoder not in _compared:
        _compare(decoder, config)
        _compared.add(decoder)


def feed(decoder: nn.Module, plan: Plan, token: np.ndarray, needed: Ints | None = None) -> Tensor:
    """Final hidden states [n, H] of the plan's queries, whose ids are token [n]; of those `needed`, where given.

    Raises ModelError for an id that has no embedding, and for layers that pass by transformers' attention interface.
    """
    rows = vocabulary(decoder)
    if len(token) and token.max() >= rows:
        raise ModelError(
            f"token id {token.max()} has no embedding: there are {rows:,}",
            where=type(decoder).__name__,
            why="the tokenizer has tokens that were added after the model was made, or is another model's",
            fix="model.resize_token_embeddings(len(tokenizer)) and train them, or use the model's own tokenizer",
        )
    ids, depth = (
        torch.from_numpy(np.ascontiguousarray(a)).to(plan.device) for a in (token, plan.depth[plan.first :])
    )
    # A 4-D mask stops the model from making one of its own; our attention doesn't look at it.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=plan.device)
    positions = {"position_ids": depth[None]}
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        positions = {}
    with last_layer.only(decoder, needed, len(token)):
        out = decoder(input_ids=ids[None], attention_mask=mask, use_cache=False, ygx=plan, **positions)
    layers = recurrent.expected_layers(decoder, config_of(decoder))
    if len(plan.layers) != layers:
        raise ModelError(
            f"{len(plan.layers)} of its {layers} layers use transformers' attention interface",
            where=type(decoder).__name__,
            why="the others would mix tokens that don't stand on one path",
        )
    return out.last_hidden_state[0]


def explain(model: Any = None) -> dict[str, str]:
    """Which routes forests take, by shape, on this machine or that of the model, and what its layers do to it."""
    if model is None:
        return _by_shape(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check(model)
    config = config_of(model)
    told = _by_shape(decoder_of(model).get_input_embeddings().weight.device)
    if config.model_type == "gpt_oss":
        told = dict.fromkeys(told, "dense (attention sinks)")
    elif getattr(config, "attn_logit_softcapping", None):
        capped = "flex" if told["forest"] == "flex" else "dense (other routes have no soft-cap)"
        told = dict.fromkeys(told, capped)
    if window := getattr(config, "sliding_window", None):
        told["sliding window"] = f"{window}, and sequences longer than it take the forest's route"
    if hasattr(config, "router_aux_loss_coef"):
        told["router loss"] = "not part of the loss"
    return told


def routes_told(model: Any) -> str:
    """`explain` in one line, for the log of a run."""
    return "attention: " + ", ".join(f"{what} {route}" for what, route in explain(model).items())


def _by_shape(device: torch.device) -> dict[str, str]:
    return {
        "one sequence": "plain",
        "sequences that share nothing": automatic(device, shared=False),
        "forest": automatic(device),
    }


@torch.no_grad()
def _compare(decoder: Any, config: Any) -> None:
    """Three branching sequences, over a forest and one by one as the model would run them anyway."""
    rng = np.random.default_rng(0)
    trunk, *tails = (rng.integers(0, config.vocab_size, n) for n in (9, 6, 8, 7))
    rows = [np.concatenate((trunk, tail)) for tail in tails]
    forest = Forest.of((ids, np.zeros(len(ids))) for ids in rows)
    embedding = decoder.get_input_embeddings().weight
    training = decoder.training
    decoder.eval()
    try:
        with _precisely(decoder, embedding.device):
            _compare_hidden(decoder, forest, rows)
    finally:
        decoder.train(training)


def _compare_hidden(decoder: Any, forest: Forest, rows: list[np.ndarray]) -> None:
    device = decoder.get_input_embeddings().weight.device
    plan = Plan.of(forest.fed_end, forest.depth[forest.fed], device)
    shared = feed(decoder, plan, forest.token[forest.fed])
    for ids, path in zip(rows, forest.paths, strict=True):
        tokens = torch.tensor(ids[:-1], device=device)
        alone = decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        ours = shared[torch.from_numpy(np.searchsorted(forest.fed, path[:-1])).to(alone.device)]
        _refuse_difference(decoder, ours.double(), alone.double(), torch.finfo(alone.dtype).eps)


@contextmanager
def _precisely(decoder: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, weights in half precision are float32, where they fit into half of the memory.

    Rounding, and experts that it chooses otherwise, can change more in half precision than mixed branches would.
    """
    parameters = list(decoder.parameters())
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


def _refuse_difference(decoder: nn.Module, ours: Tensor, alone: Tensor, eps: float) -> None:
    difference = float((ours - alone).norm() / alone.norm())
    if not difference < min(300 * eps, 0.5):
        raise ModelError(
            f"over a small forest its hidden states differ by {difference:.1e} from those of the sequences alone",
            where=type(decoder).__name__,
            why="some layer mixes tokens that don't stand on one path, so log-probabilities would be wrong",
            fix="use a model of a proven family: " + ", ".join(sorted(PROVEN)),
        )
