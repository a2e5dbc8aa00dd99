"""What adapters and hooks make of a model: the head as one product, and what isn't one refused by name.

The head's own forward is never called, so what happens in it has to be in its weight. PEFT isn't imported: where it
hasn't been, no layer is of its making.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import MissingExtra, ModelError
from .resolve import file_of


def product(layer: Any) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], bias [V] or None) of an output layer with its adapters, differentiable.

    Raises ModelError for an adapter that isn't a product with the hidden states, and for hooks.
    """
    _refuse_hooks(layer)
    if hasattr(layer, "modules_to_save"):  # a copy that is trained in the place of the original
        kept = layer.disable_adapters or not layer.active_adapters
        return product(layer.original_module if kept else layer.modules_to_save[layer.active_adapters[0]])
    # PEFT's trainable_token_indices, where embeddings are tied.
    layer = getattr(layer, "token_adapter", layer)
    if not type(layer).__module__.startswith("peft."):
        return layer.weight, layer.bias
    if not hasattr(layer, "base_layer"):
        raise _not_a_product(type(layer).__name__)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward does
    weight, bias = product(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    if hasattr(layer, "token_indices") and isinstance(layer.base_layer, nn.Linear):
        return layer.get_merged_weights(layer.active_adapters), None  # its forward leaves a bias out, too
    if type(layer) is not sys.modules["peft.tuners.lora"].Linear or not isinstance(
        layer.get_base_layer(), nn.Linear
    ):
        raise _not_a_product(f"{type(layer).__module__}.{type(layer).__name__}")
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight, bias = _with_lora(layer, name, weight, bias)
    return weight, bias


def with_adapter(model: Any, path: str, tokens: int) -> Any:
    """A base model with the adapter of a directory, its embeddings as many as the adapter was trained with.

    tokens: of the adapter's tokenizer, which counts where the adapter brings no embeddings of its own.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "lora", needed_for=f"the adapter in {path}") from error
    rows = _saved_embeddings(model, path) or max(tokens, len(model.get_input_embeddings().weight))
    if rows != len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows, mean_resizing=False)  # what is new comes from the adapter
    return peft.PeftModel.from_pretrained(model, path, is_trainable=True)


def _saved_embeddings(model: Any, path: str) -> int | None:
    """Rows of a table of embeddings that an adapter's file holds whole; None without one."""
    file = file_of(path, "adapter_model.safetensors")
    if file is None:
        return None
    shapes: dict[str, Any] = {name: p.shape for name, p in model.named_parameters()}
    ends = {shapes[n] for n in shapes if n.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight"))}
    with safe_open(file, "pt") as saved:
        for name in saved.keys():  # noqa: SIM118 - no mapping
            shape: list[int] = saved.get_slice(name).get_shape()
            own: Any = shapes.get(name.removeprefix("base_model.model."))
            if own in ends and len(shape) == 2 and shape[1] == own[1]:
                return int(shape[0])
    return None


def refuse_unread(model: Any) -> None:
    """Raise ModelError for an adapter that works in the model's own forward, which isn't called."""
    config = getattr(model, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", "")
    if getattr(config, "is_prompt_learning", False):
        raise ModelError(
            f"{kind.lower().replace('_', ' ')} can't be computed over a forest",
            where=type(model).__name__,
            why="its virtual tokens stand before every sequence, and log-probabilities without them would be others",
            fix="use LoRA, or merge_and_unload() what can be merged",
        )
    if kind == "XLORA" or getattr(config, "alora_invocation_tokens", None):
        raise ModelError(
            f"{'X-LoRA' if kind == 'XLORA' else 'activated LoRA'} can't be computed over a forest",
            where=type(model).__name__,
            why="what it adds depends on the whole sequence, and is found in a forward pass that isn't called here",
            fix="use plain LoRA",
        )


def _with_lora(layer: Any, name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or layer.use_dora.get(name):
        raise _not_a_product("DoRA" if layer.use_dora.get(name) else type(variant).__name__)
    dropout = layer.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        raise _not_a_product(
            f"LoRA with a dropout of {dropout.p:g}", "set lora_dropout=0, or leave the head out"
        )
    down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    _refuse_hooks(down, up)
    # Of two dtypes the wider one: an adapter's first steps are smaller than bfloat16 could add to the weight.
    wide = torch.promote_types(weight.dtype, up.weight.dtype)
    weight = weight.to(wide) + scaling * (up.weight @ down.weight).to(wide)
    if up.bias is not None:
        more = scaling * up.bias
        bias = more if bias is None else bias + more
    return weight, bias


def _not_a_product(
    what: str, fix: str = "leave the head out of target_modules, or merge the adapter"
) -> ModelError:
    return ModelError(
        f"{what} on the language-model head can't be computed",
        why="it isn't one product with the hidden states, and would be left out",
        fix=fix,
    )


def _refuse_hooks(*layers: Any) -> None:
    for layer in layers:
        for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith("ygivenx."):
                name = getattr(hook, "__qualname__", type(hook).__name__)
                raise ModelError(
                    f"the language-model head has a hook, {name}",
                    where=type(layer).__name__,
                    why="its forward isn't called, only its weight read, so the hook would do nothing",
                    fix="remove it; where it makes the weight, use torch.nn.utils.parametrizations instead",
                )
