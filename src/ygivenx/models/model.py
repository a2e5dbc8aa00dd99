"""Models: loading them, their hidden states over a forest, and their head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from ..errors import ModelError
from ..forest import Forest
from . import streaming
from .attention import Plan
from .families import check, config_of, decoder_of, feed
from .places import located, quiet_loading


class Head(NamedTuple):
    """The last layer: logits = scale·(h·weightᵀ + bias), then softcap·tanh(logits / softcap) if there is one.

    weight [V, H], bias [V] or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


def load(
    path: str | Path, gguf_file: str | None = None, dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(model in eval mode, tokenizer) from a directory, or from a GGUF file inside one.

    dtype: float32 by default. device: the first CUDA device if there is one, else the CPU. Code that comes
    with a model is never run, and only safetensors and GGUF are read. Raises MissingExtra without `gguf`.
    """
    path, gguf_file = located(path, gguf_file)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with quiet_loading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, gguf_file=gguf_file, dtype=dtype or torch.float32, use_safetensors=True
        )
    if gguf_file is not None:
        _forget_quantization(model)
    return model.to(device).eval(), tokenizer


def _forget_quantization(model: Any) -> None:
    """The weights are plain tensors now; a model that says otherwise can't be moved, saved or reloaded."""
    model.is_quantized = False
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    if hasattr(model, "quantization_method"):
        del model.quantization_method


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model, for `selective_cross_entropy`. Raises ModelError without one."""
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no language-model head", fix="load it as a causal LM")
    config = config_of(model)
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), 1.0)


def hidden_states(
    model: nn.Module, forest: Forest, *, route: str = "auto", chunk: int | None = None
) -> Tensor:
    """Final hidden states, after the last norm, of the nodes with children: [F, H], differentiable.

    Row i belongs to node forest.fed[i]. chunk: compute so many tokens at a time, exact all the same, in memory
    that is bounded by the chunk; by default that happens where the forest needs more than half of the memory.
    Dropout is drawn once per node, so sequences share it where they share tokens. Auxiliary losses of routers
    aren't part of it. Raises ModelError for a model that can't attend along a forest.
    """
    check(model)
    decoder, length = decoder_of(model), len(forest.fed)
    embedding = decoder.get_input_embeddings().weight
    if not length:
        return embedding[:0]
    if chunk is None and length > streaming.automatic(model):
        chunk = streaming.CHUNK
    if chunk is not None and length > chunk:
        return streaming.streamed(model, forest, chunk, route)
    plan = Plan.of(forest.fed_end, forest.depth[forest.fed], embedding.device, route)
    return feed(decoder, plan, forest.token[forest.fed])
