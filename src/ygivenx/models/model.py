"""Models: loading them, their hidden states over a forest, and their head."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ..choices import Route, require_choice
from ..errors import ConfigError, ModelError
from ..forest import Forest, Ints
from . import chunked_backward, streaming
from .adapters import with_adapter
from .families import decoder_of
from .logits import head_of as head_of
from .logits import softcap_and_scale as softcap_and_scale
from .position_limits import PositionLimits
from .resolve import base_of_adapter, located, quiet_loading
from .sharing import reason_unshared
from .unshared import UnsharedRun

logger = logging.getLogger(__name__)


def load(
    path: str | Path, gguf_file: str | None = None, dtype: torch.dtype | None = None,
    device: str | torch.device | None = None, *, trust_remote_code: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """(model in eval mode, tokenizer) from a directory, or from a GGUF file inside one.

    A directory with an adapter gives its base model with the adapter. dtype: float32 by default. device: the first
    CUDA device if there is one, else the CPU. Only safetensors and GGUF are read. Code that comes with a model is run
    with trust_remote_code=True alone, and nobody is asked. Of a multimodal checkpoint the language model reads text.
    Raises MissingExtra without `gguf` or `peft` where needed, ModelError for weights that the files lack.
    """
    path, gguf_file = located(path, gguf_file)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    settings = {"dtype": dtype or torch.float32, "use_safetensors": True, **options}
    with quiet_loading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        with base_of_adapter(path) as base:
            auto = _auto_class(transformers.AutoConfig.from_pretrained(base or path, **options))
            model: Any
            model, info = auto.from_pretrained(base or path, output_loading_info=True, **settings)
        _account_for_weights(base or path, info)
        if base is not None:
            model = with_adapter(model, path, len(tokenizer))
    if gguf_file is not None:
        _forget_quantization(model)
    return model.to(device).eval(), tokenizer


def _account_for_weights(path: str, info: Any) -> None:
    """Raise ModelError for weights that the model has and its files lack; say which of the files' are left out."""
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"its files lack {len(missing)} of its weights, such as {missing[0]}", where=path,
            why="transformers would fill them with random numbers", fix="get the whole checkpoint",
        )  # fmt: skip
    if left_out := sorted({name.split(".")[0] for name in info["unexpected_keys"]}):
        logger.warning("%s: not loaded, since text doesn't need it: %s", path, ", ".join(left_out))


def _auto_class(config: Any) -> Any:
    """What loads a model: for a multimodal one without a class of its own for text, the one that reads images, too."""
    text, multimodal = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    kind = type(config)
    return multimodal if kind in multimodal._model_mapping and kind not in text._model_mapping else text


def _forget_quantization(model: Any) -> None:
    """The weights are plain tensors now; a model that says otherwise can't be moved, saved or reloaded."""
    model.is_quantized = False
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    if hasattr(model, "quantization_method"):
        del model.quantization_method


def hidden_states(
    model: nn.Module, forest: Forest, *, route: Route = "auto", chunk: int | None = None, needed: Ints | None = None
) -> Tensor:  # fmt: skip
    """What the logit head reads, of the nodes with children: [F, H], differentiable. Most often the last norm's output.

    Row i belongs to node forest.fed[i]. chunk: compute so many tokens at a time, exact all the same, in memory
    that is bounded by the chunk; by default that happens where the forest needs more than half of the memory.
    needed: the rows that will be read, int64 [n], sorted; the others may then hold anything, which spares most of
    the last layer. By default all.
    Dropout is drawn once per node, so sequences share it where they share tokens. Auxiliary losses of routers
    aren't part of it. Raises ModelError for a model that can't attend along a forest.
    """
    run = _run(model, forest, route, chunk, needed)
    return run.at_once() if run.fits else chunked_backward.hidden_states(run)


def loss_over(
    model: nn.Module, forest: Forest, score: chunked_backward.Score, *,
    route: Route = "auto", chunk: int | None = None, needed: Ints | None = None,
) -> Tensor:  # fmt: skip
    """The sum of score(rows, hidden states of these rows [n, H]), the loss of rows int64 [n], over all rows.

    Where the forest is longer than `chunk`, it is called once per chunk, and less is computed twice than for
    `hidden_states`. Arguments and errors are those of `hidden_states`.
    """
    run = _run(model, forest, route, chunk, needed)
    if run.fits:
        return score(np.arange(len(forest.fed)), run.at_once())
    return chunked_backward.loss(run, score)


def stream_hidden(
    model: nn.Module, forest: Forest, *, chunk: int, route: Route = "auto", needed: Ints | None = None
) -> Iterator[tuple[Ints, Tensor]]:
    """(rows int64 [n], hidden [n, H]), about `chunk` rows at a time; no gradients.

    Arguments and errors are those of `hidden_states`.
    """
    with torch.no_grad():
        run = _run(model, forest, route, chunk, needed)
    return run.stream()


def _run(
    model: nn.Module, forest: Forest, route: Route, chunk: int | None, needed: Ints | None
) -> chunked_backward.AnyRun:
    """How a forest is computed: shared or not, at once or in chunks."""
    require_choice("route", route, Route)
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk is {chunk}", fix="give at least 1 token; 512 to 4096 is usual")
    decoder = decoder_of(model)
    size = streaming.automatic(model) if chunk is None else chunk
    in_chunks = len(forest.fed) > size
    unshared = bool(reason_unshared(model, forest, route, in_chunks))
    # A sequence that is run by itself is never cut, so it has the positions that it has alone.
    lengths = np.array([len(path) for path in forest.paths], np.int64)
    PositionLimits.of(model).refuse(lengths, whole=unshared or not in_chunks)
    run: chunked_backward.AnyRun = (
        UnsharedRun.of(model, decoder, forest, size)
        if unshared
        else streaming.Run.of(model, forest, size, route, needed)
    )
    if not run.fits:
        streaming.refuse_reentrant(model)
    return run
