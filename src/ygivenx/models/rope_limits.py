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
    fed = [len(path) - 1 for path in forest.paths]
    shortest, longest = min(fed, default=0), max(fed, default=0)
    for kind, limit in _switches(decoder):
        if longest <= limit or (kind == "longrope" and whole and shortest > limit):
            continue
        raise ModelError(
            f"its rotary embedding ({kind}) changes beyond {limit:,} tokens, "
            f"and of these sequences {shortest:,} to {longest:,} are read",
            where=type(decoder).__name__,
            why="a forest gets one embedding for all tokens, so some would get another than alone",
            fix=f"keep sequences to {limit:,} tokens (max_length={limit})"
            + (", or have all beyond that, in one piece" if kind == "longrope" else ""),
        )


def unchanged(decoder: nn.Module) -> int | None:
    """Tokens up to which every sequence has the same frequencies; None where they don't depend on its length."""
    return min((limit for _, limit in _switches(decoder)), default=None)


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
