"""Models: loading them, their hidden states over a forest, and their head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..forest import Forest, Ints
from ..head.logit_head import LogitHead
from . import chunked_backward, streaming
from .adapters import product, with_adapter
from .families import PROVEN, config_of, decoder_of
from .plan import refuse_unknown_route
from .position_limits import refuse_lengths
from .resolve import base_of_adapter, located, quiet_loading
from .sharing import reason_unshared
from .unshared import UnsharedRun


def load(
    path: str | Path, gguf_file: str | None = None, dtype: torch.dtype | None = None,
    device: str | torch.device | None = None, *, trust_remote_code: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """(model in eval mode, tokenizer) from a directory, or from a GGUF file inside one.

    A directory with an adapter gives its base model with the adapter. dtype: float32 by default. device: the first
    CUDA device if there is one, else the CPU. Only safetensors and GGUF are read. Code that comes with a model is run
    with trust_remote_code=True alone, and nobody is asked. Raises MissingExtra without `gguf` or `peft` where needed.
    """
    path, gguf_file = located(path, gguf_file)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    settings = {"dtype": dtype or torch.float32, "use_safetensors": True, **options}
    with quiet_loading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        with base_of_adapter(path) as base:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(base or path, **settings)
        if base is not None:
            model = with_adapter(model, path, len(tokenizer))
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


def head_of(model: nn.Module) -> LogitHead:
    """The head of a causal language model, for `selective_cross_entropy`.

    A LoRA on it is part of its weight, with gradients. Soft cap and scale are read from the config; where the family
    isn't a proven one they are checked once against the model's own logits. Raises ModelError without a head, or if
    it does more than `LogitHead` says.
    """
    return LogitHead(*product(_head_layer(model)), *softcap_and_scale(model))


def softcap_and_scale(model: nn.Module) -> tuple[float | None, float]:
    """What is done to the product of hidden states and head; see `LogitHead`. Raises ModelError like `head_of`."""
    config = config_of(model)
    softcap = getattr(config, "final_logit_softcapping", None)
    if config.model_type in PROVEN:
        return softcap, 1.0
    if model not in _scales:
        _scales[model] = _measured_scale(model, LogitHead(*product(_head_layer(model)), softcap, 1.0), config)
    return softcap, _scales[model]


def _head_layer(model: Any) -> Any:
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no language-model head", fix="load it as a causal LM")
    return layer


# What configs call the factor of the logits. One family multiplies by what another divides by under the same name.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_scales: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


@torch.no_grad()
def _measured_scale(model: Any, head: LogitHead, config: Any) -> float:
    """The factor, 1 or one that the config names, with which `head` gives the logits of the model itself."""
    ids = torch.arange(4, device=head.weight.device)[None] % config.vocab_size
    training = model.training
    model.eval()
    try:
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        theirs = model(input_ids=ids, use_cache=False).logits.double()
    finally:
        model.train(training)
    raw = head.product(hidden).double()
    named = [float(v) for v in (getattr(config, n, None) for n in _SCALES) if v]
    for scale in [1.0, *named, *(1 / v for v in named)]:
        z, _ = replace(head, scale=scale).from_product(raw)
        # The same products on the same numbers: all that differs is the rounding of the scale.
        if (z - theirs).norm() <= 4 * torch.finfo(head.weight.dtype).eps * theirs.norm():
            return scale
    raise ModelError(
        "its logits aren't its head's product with the last hidden states",
        where=type(model).__name__,
        why="neither 1 nor a factor in its config makes them equal, so log-probabilities would be wrong",
        fix="use a model of a proven family: " + ", ".join(sorted(PROVEN)),
    )


def hidden_states(
    model: nn.Module, forest: Forest, *, route: str = "auto", chunk: int | None = None, needed: Ints | None = None
) -> Tensor:  # fmt: skip
    """Final hidden states, after the last norm, of the nodes with children: [F, H], differentiable.

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
    route: str = "auto", chunk: int | None = None, needed: Ints | None = None,
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
    model: nn.Module, forest: Forest, *, chunk: int, route: str = "auto", needed: Ints | None = None
) -> Iterator[tuple[Ints, Tensor]]:
    """(rows int64 [n], hidden [n, H]), about `chunk` rows at a time; no gradients.

    Arguments and errors are those of `hidden_states`.
    """
    with torch.no_grad():
        run = _run(model, forest, route, chunk, needed)
    return run.stream()


def _run(
    model: nn.Module, forest: Forest, route: str, chunk: int | None, needed: Ints | None
) -> chunked_backward.AnyRun:
    """How a forest is computed: shared or not, at once or in chunks."""
    refuse_unknown_route(route)
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk is {chunk}", fix="give at least 1 token; 512 to 4096 is usual")
    decoder = decoder_of(model)
    size = streaming.automatic(model) if chunk is None else chunk
    in_chunks = len(forest.fed) > size
    if reason_unshared(model, forest, route, in_chunks):
        # A sequence is never cut here, so each has the positions that it has by itself.
        refuse_lengths(decoder, forest, whole=True)
        run: chunked_backward.AnyRun = UnsharedRun.of(model, decoder, forest, size)
    else:
        refuse_lengths(decoder, forest, whole=not in_chunks)
        run = streaming.Run.of(model, forest, size, route, needed)
    if not run.fits:
        streaming.refuse_reentrant(model)
    return run
