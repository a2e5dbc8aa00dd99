"""The parts of a model that read tokens, and feeding a forest to them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..forest import Ints
from . import last_layer, recurrent
from .plan import Plan
from .wrappers import inner_of

# `model_type` of the decoders' configs. The tests compare them with unshared runs, gradients included.
PROVEN = {
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2",
    "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "smollm3",
}  # fmt: skip


# Families whose attention is written by hand: it adds the mask that it is given to its scores, and so can be given a
# forest's. Whether it does nothing else by place is known of these by reading them, and compared on first use.
BY_HAND = {"codegen", "falcon", "gptj", "gpt_neox_japanese", "nemotron", "stablelm", "xglm"}


def decoder_of(model: Any) -> Any:
    """The part that maps tokens to final hidden states. Raises ModelError for what isn't a causal LM."""
    decoder: Any = getattr(model, "get_decoder", lambda: None)()
    if not hasattr(decoder, "get_input_embeddings"):  # ModernBERT's `decoder` is its logit head
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = getattr(whole, "base_model", None)
    elif getattr(decoder, "get_output_embeddings", lambda: None)() is not None:  # a causal LM, as in Llama 4
        inner = decoder.get_decoder()
        decoder = getattr(decoder, "model", decoder) if inner is decoder else inner
    if not hasattr(decoder, "get_input_embeddings"):
        wrapped = inner_of(model) is not model
        fix = "pass the model inside it, .module" if wrapped else "load it with AutoModelForCausalLM"
        raise ModelError(f"{type(model).__name__} has no decoder", fix=fix)
    return decoder


def embeddings_of(decoder: Any) -> Tensor:
    """The table of token embeddings [V, H] on the device that reads tokens, without what adapters make of it."""
    layer = decoder.get_input_embeddings()
    while not isinstance(layer, nn.Embedding) and hasattr(layer, "original_module"):
        layer = layer.original_module  # PEFT's wrapper would make a whole new table of it
    weight: Tensor = layer.weight
    if weight.is_meta:
        raise ModelError(
            "its weights are on the device `meta`, which holds no numbers", where=type(decoder).__name__,
            fix="load it with yx.load, or from_pretrained without device_map='meta' and offloading",
        )  # fmt: skip
    return weight


def vocabulary(decoder: Any) -> int:
    """How many tokens have an embedding."""
    return len(embeddings_of(decoder))


def config_of(model: Any) -> Any:
    """The config of the language model, also where a model has several."""
    return model.config.get_text_config(decoder=True)


def refuse_unknown_ids(decoder: Any, token: Ints) -> None:
    """Raise ModelError for an id that has no embedding."""
    rows = vocabulary(decoder)
    if len(token) and token.max() >= rows:
        raise ModelError(
            f"token id {token.max()} has no embedding: there are {rows:,}",
            where=type(decoder).__name__,
            why="the tokenizer has tokens that were added after the model was made, or is another model's",
            fix="model.resize_token_embeddings(len(tokenizer)) and train them, or use the model's own tokenizer",
        )


def _expected_layers(decoder: nn.Module, config: Any) -> int:
    """How many layers have to ask how to attend; those that read images are left out where there are none."""
    layers = getattr(config, "decoder_layers", None) or recurrent.expected_layers(decoder, config)
    images = [i for i in getattr(config, "cross_attention_layers", None) or () if i < layers]
    return int(layers) - len(images)


def feed(decoder: nn.Module, plan: Plan, token: np.ndarray, needed: Ints | None = None) -> Tensor:
    """Final hidden states [n, H] of the plan's queries, whose ids are token [n]; of those `needed`, where given.

    Raises ModelError for an id that has no embedding, and for layers that pass by transformers' attention interface.
    """
    refuse_unknown_ids(decoder, token)
    ids, depth = (
        torch.from_numpy(np.ascontiguousarray(a)).to(plan.device) for a in (token, plan.depth[plan.first :])
    )
    config = config_of(decoder)
    by_hand = config.model_type in BY_HAND
    # A 4-D mask stops the model from making one of its own; our attention doesn't look at it.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=plan.device)
    if by_hand:
        mask = plan.additive_mask(embeddings_of(decoder).dtype)
    # RWKV, which attends to nothing, says in the log of a mask that it isn't used.
    masks = {"attention_mask": mask} if hasattr(config, "num_attention_heads") else {}
    positions = {"position_ids": depth[None]}
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        positions = {}
    with last_layer.only(decoder, needed, len(token)), recurrent.carried(decoder, plan):
        out = decoder(input_ids=ids[None], use_cache=False, ygx=plan, **masks, **positions)
    layers = _expected_layers(decoder, config)
    # Some families run their layers several times.
    if layers not in (len(plan.layers), plan.calls) and not by_hand:
        raise ModelError(
            f"{len(plan.layers)} of its {layers} layers use transformers' attention interface",
            where=type(decoder).__name__,
            why="the others would mix tokens that don't stand on one path",
        )
    return _hidden(out)[0]


def feed_sequences(decoder: nn.Module, ids: Tensor) -> Tensor:
    """Final hidden states [n, T, H] of ids [n, T], as the model itself would run them."""
    parameters = inspect.signature(decoder.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
    return _hidden(decoder(input_ids=ids, **options))


def _hidden(out: Any) -> Tensor:
    """The last hidden states of a decoder's output, which is a tuple where its config has `return_dict=False`."""
    hidden: Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    return hidden
