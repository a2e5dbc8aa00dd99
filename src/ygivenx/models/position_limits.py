"""Positions that a model hasn't, and rotary embeddings that are others for longer sequences.

A learned position beyond the last one is an index that isn't there. Of rotary embeddings a forest gets one for all of
its nodes. transformers chooses by the largest position of a forward pass. `longrope` has two sets of frequencies, one
up to a length and one beyond it; `dynamic` has one up to a length, and beyond it another for each length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..forest import Forest

_POSITIONS = re.compile("wpe|position_embeddings?|positions_embed|embed_positions")


def refuse_lengths(decoder: nn.Module, forest: Forest, whole: bool) -> None:
    """Raise ModelError where a sequence has no position, or alone would have other frequencies than in this forest.

    whole: whether the forest is computed in one piece. A chunk would get the frequencies of its own positions.
    """
    fed = [len(path) - 1 for path in forest.paths]
    shortest, longest = min(fed, default=0), max(fed, default=0)
    refuse_beyond(decoder, longest)
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


def refuse_beyond(decoder: nn.Module, longest: int) -> None:
    """Raise ModelError where `longest` tokens are read, more than there are learned positions."""
    most = learned(decoder)
    if most is not None and longest > most:
        raise ModelError(
            f"it has {most:,} positions, and a sequence of {longest + 1:,} tokens needs {longest:,}",
            where=type(decoder).__name__,
            why="its position embeddings were learned, and there is none beyond the last",
            fix=f"keep sequences to {most + 1:,} tokens (max_length={most + 1})",
        )


def learned(decoder: nn.Module) -> int | None:
    """How many tokens its tables of positions allow; None where it has none. The last token of a row isn't read."""
    return min(_tables(decoder), default=None)


def _tables(decoder: nn.Module) -> Iterator[int]:
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name.rpartition(".")[2]):
            # OPT and BART skip rows by `offset`; RoBERTa begins behind the row for padding.
            skipped = getattr(module, "offset", 0) or (
                module.padding_idx is not None and module.padding_idx + 1
            )
            yield module.num_embeddings - int(skipped)
        for table in (getattr(module, attribute, None) for attribute in ("embed_positions", "pos_encoding")):
            if isinstance(table, Tensor) and table.ndim == 2:  # GPT-J, CodeGen and CTRL: sines
                yield len(table)


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
                parameters = module.config.rope_parameters
                yield (
                    kind,
                    (parameters if layer is None else parameters[layer])["original_max_position_embeddings"],
                )
            elif isinstance(kind, str) and "dynamic" in kind:
                yield kind, module.original_max_seq_len
