"""What a model's configs say that rows are held against: how much it reads, and where generation stops."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..models.resolve import located


class Limits(NamedTuple):
    """context_length: the positions that the model was made for, None if unknown. stop_ids: its eos tokens."""

    context_length: int | None = None
    stop_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Any, generation_config: Any) -> Limits:
        """From transformers' configs; either may be None."""
        text = None if config is None else config.get_text_config()
        stops = getattr(generation_config, "eos_token_id", None)
        ids = [] if stops is None else np.atleast_1d(stops).tolist()
        return cls(getattr(text, "max_position_embeddings", None), frozenset(ids))


def read_limits(model: str, gguf_file: str | None = None) -> Limits:
    """The limits of a model that isn't loaded, from its directory or the hub's cache: empty where there are none."""
    from transformers import AutoConfig, GenerationConfig

    place, gguf_file = located(model, gguf_file)
    here = {"local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(place, gguf_file=gguf_file, trust_remote_code=False, **here)
    except (OSError, ValueError):  # a tokenizer's directory has none; a model's own code isn't run
        config = None
    try:
        generation = GenerationConfig.from_pretrained(place, **here)
    except (OSError, ValueError):
        generation = None if config is None else GenerationConfig.from_model_config(config)
    return Limits.of(config, generation)
