"""Rotary embeddings that are others for longer sequences: a forest gets one for all of its nodes.

transformers chooses by the largest position of a forward pass. `longrope` has two sets of frequencies, one up to a
length and one beyond it; `dynamic` has one up to a length, and beyond it another for each length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import ModelError
from ..forest import Forest


def refuse_lengths(decoder: nn.Module, forest: Forest, whole: bool) -> None:
    """Raise ModelError where some sequence alone would have other frequencies than in this forest.

    whole: whether the forest is computed in one piece. A chunk would get the frequencies of its own positions.
    """
    lengths = [len(path) for path in forest.paths]
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    for kind, limit in _switches(decoder):
        # The last token of a sequence isn't fed, so the longest one has to be two longer for the switch to be seen.
        all_beyond = kind == "longrope" and whole and shortest > limit and longest > limit + 1
        if longest > limit and not all_beyond:
            raise ModelError(
                f"its rotary embedding ({kind}) changes beyond {limit:,} tokens, "
                f"and this forest has sequences of {shortest:,} to {longest:,}",
                where=type(decoder).__name__,
                why="a forest gets one embedding for all tokens, so some would get another than alone",
                fix=f"keep sequences to {limit:,} tokens"
                + (
                    ", or have all beyond that and computed in one piece (chunk=)"
                    if kind == "longrope"
                    else ""
                ),
            )


def _switches(decoder: nn.Module) -> Iterator[tuple[str, int]]:
    """(kind, length) of each rotary embedding that is another one for sequences of more tokens."""
    module: Any
    for module in decoder.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind == "longrope":
                told = module.config.rope_parameters
                yield kind, (told if layer is None else told[layer])["original_max_position_embeddings"]
            elif isinstance(kind, str) and "dynamic" in kind:
                yield kind, module.original_max_seq_len
