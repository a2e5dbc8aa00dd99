"""How long sequences can be: positions that a model hasn't, and rotary embeddings that are others for longer ones.

A learned position beyond the last one is an index that isn't there. Of rotary embeddings a forest gets one for all of
its nodes. transformers chooses by the largest position of a forward pass. `longrope` has two sets of frequencies, one
up to a length and one beyond it; `dynamic` has one up to a length, and beyond it another for each length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..forest import Ints
from .families import config_of, decoder_of

_POSITIONS = re.compile("wpe|position_embeddings?|positions_embed|embed_positions")
_TOWERS = re.compile("vision|visual|image|img|audio|speech")  # their positions aren't those of text


@dataclass(frozen=True)
class PositionLimits:
    """What bounds the lengths of a model's sequences, in tokens that are read: the last one of a sequence isn't.

    most: no sequence has more, None where there is no such bound; limited_by and why say it in words. switches: (kind,
    tokens up to which it is the same for all) of each rotary embedding that is another one for longer sequences.
    """

    model: str
    most: int | None
    limited_by: str
    why: str
    switches: list[tuple[str, int]]

    @classmethod
    def of(cls, model: Any) -> PositionLimits:
        positions, keys = min(_tables(decoder_of(model)), default=None), _indexed_keys(config_of(model))
        by_keys = keys is not None and (positions is None or keys < positions)
        return cls(
            type(model).__name__,
            keys if by_keys else positions,
            f"its indexers choose {keys:,} keys" if by_keys else f"it has {positions or 0:,} positions",
            "without a cache transformers' own code chooses among later keys, too, so that padding changes logits"
            if by_keys
            else "its position embeddings are a table, and there is none beyond the last",
            list(_switches(decoder_of(model))),
        )

    @property
    def unchanged(self) -> int | None:
        """Tokens up to which each sequence is computed as it would be alone; None without a bound."""
        return min((n for n in (self.most, *(n for _, n in self.switches)) if n is not None), default=None)

    def refuse(self, lengths: Ints, whole: bool = True, where: str = "") -> None:
        """Raise ModelError where a sequence has no position, or alone would have other frequencies than in a forest.

        lengths: int64 [n], tokens of the sequences of one forest. whole: whether it is computed in one piece. A chunk
        would get the frequencies of its own positions. where: what the longest one is called.
        """
        if not len(lengths) or self.unchanged is None:
            return
        shortest, longest = int(lengths.min()) - 1, int(lengths.max()) - 1
        where = where or self.model
        if self.most is not None and longest > self.most:
            raise ModelError(
                f"{self.limited_by}, and a sequence of {longest + 1:,} tokens needs {longest:,}",
                where=where, why=self.why,
                fix=f"keep sequences to {self.most + 1:,} tokens (max_length={self.most + 1})",
            )  # fmt: skip
        for kind, switch in self.switches:
            if longest <= switch or (kind == "longrope" and whole and shortest > switch):
                continue
            raise ModelError(
                f"its rotary embedding ({kind}) changes beyond {switch:,} tokens, "
                f"and of these sequences {shortest:,} to {longest:,} are read",
                where=where,
                why="a forest gets one embedding for all tokens, so some would get another than alone",
                fix=f"keep sequences to {switch:,} tokens (max_length={switch})"
                + (", or have all beyond that, in one piece" if kind == "longrope" else ""),
            )

    def refuse_max_length(self, max_length: int) -> None:
        """Raise ConfigError where texts of `max_length` tokens are longer than the model can read."""
        if self.most is not None and max_length > self.most + 1:
            raise ConfigError(
                f"max_length={max_length:,}, but {self.limited_by}",
                where=self.model, why=self.why, fix=f"give max_length={self.most} or less, or leave it out",
            )  # fmt: skip


def _indexed_keys(config: Any) -> int | None:
    """How many keys indexers choose: up to there they take all. A comparison on first use is too short to see it."""
    indexed = "indexed_attention" in (getattr(config, "layer_types", None) or ())
    return getattr(config, "index_topk", None) if indexed else None


def _tables(decoder: nn.Module) -> Iterator[int]:
    """How many tokens each table of positions allows."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding):
            if _POSITIONS.fullmatch(name.rpartition(".")[2]) and not _TOWERS.search(name):
                # OPT and BART skip rows by `offset`; RoBERTa begins behind the row for padding.
                skipped = getattr(module, "offset", 0) or (
                    module.padding_idx is not None and module.padding_idx + 1
                )
                yield module.num_embeddings - int(skipped)
            continue
        for attribute in ("embed_positions", "pos_encoding"):
            # GPT-J, CodeGen and CTRL: sines. Not `getattr`, whose failure costs more than the search.
            table = module._buffers.get(attribute, module.__dict__.get(attribute))
            if isinstance(table, Tensor) and table.ndim == 2 and not _TOWERS.search(name):
                yield len(table)


def _switches(decoder: nn.Module) -> Iterator[tuple[str, int]]:
    """(kind, length) of each rotary embedding that is another one for sequences of more tokens."""
    module: Any
    for module in decoder.modules():
        kinds: Any = module.__dict__.get("rope_type")
        for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind == "longrope":
                parameters = module.config.rope_parameters
                yield (
                    kind,
                    (parameters if layer is None else parameters[layer])["original_max_position_embeddings"],
                )
            elif isinstance(kind, str) and "dynamic" in kind:
                yield kind, module.original_max_seq_len
