"""Sequences in packs, each a forest and one micro-batch, and the order in which epochs see them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from ..errors import ConfigError
from ..forest import Forest, pack
from ..sequence import Example, Sequence


class Packs(Dataset[dict[str, Any]]):
    """Sequences packed into forests; item i is {"forest": ...}, one micro-batch.

    `names[i]` says for each sequence of pack i where it comes from. `skipped` counts packs without any weight:
    they would be steps that do nothing, so they are left out, never silently trained as 0/0.
    """

    def __init__(
        self, sequences: Iterable[Any], *, max_tokens: int, seed: int, denominator: str = "tokens"
    ) -> None:
        flat, labels = flatten(sequences)
        self.sequences = per_sequence(flat) if denominator == "sequence" else flat
        packs = pack(self.sequences, max_tokens=max_tokens, seed=seed)
        self.forests = [f for f in packs if f.weight.any()]
        self.skipped = len(packs) - len(self.forests)
        self.names = [[labels[i] for i in f.members] for f in self.forests]

    def fill(self, ranks: int) -> None:
        """Every rank needs the same number of micro-batches: add packs that weigh nothing."""
        while len(self) % ranks:
            self.forests.append(_weightless(self.forests[0]))
            self.names.append(["a filler"])

    def __str__(self) -> str:
        distinct = sum(len(f.token) for f in self.forests)
        total = sum(len(p) for f in self.forests for p in f.paths)
        trained = sum(int((f.weight[p] > 0).sum()) for f in self.forests for p in f.paths)
        return (
            f"{sum(len(f.paths) for f in self.forests):,} sequences in {len(self):,} packs: {total:,} tokens, "
            f"{distinct:,} distinct (sharing {total / max(distinct, 1):.2f}), {trained / max(total, 1):.1%} trained"
            + (f"; {self.skipped} packs without any weight left out" if self.skipped else "")
        )

    def __len__(self) -> int:
        return len(self.forests)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"forest": self.forests[index], "names": self.names[index]}

    @property
    def fingerprint(self) -> str:
        """A hash over every token, weight and place: two equal ones train the same."""
        digest = hashlib.sha256()
        for f in self.forests:
            for values in (f.token, f.parent, f.weight):
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


def flatten(items: Iterable[Any]) -> tuple[list[Sequence], list[str]]:
    """Examples and sequences as sequences, with a name for each ("row 3", "row 3, turn 1").

    A row's number is the example's own, among all that were read, or else its place among the items; from 0.
    Raises ConfigError for an item that is neither.
    """
    flat, names = [], []
    for i, item in enumerate(items):
        if not isinstance(item, Example | Sequence):
            raise ConfigError(
                f"item {i} of the data set is a {type(item).__name__}, not an Example or a Sequence",
                why="packs are made of encoded rows: token ids with a weight for each",
                fix="examples, rejected = yx.Encoder(tokenizer).batch(rows), and give it the examples",
            )
        parts, known = (list(item), item.index) if isinstance(item, Example) else ([item], None)
        row = f"row {i if known is None else known}"
        for turn, sequence in enumerate(parts):
            flat.append(sequence)
            names.append(f"{row}, turn {turn}" if len(parts) > 1 else row)
    return flat, names


def per_sequence(sequences: Iterable[Sequence]) -> list[Sequence]:
    """Each sequence's weights divided by their sum: the loss becomes the mean of per-sequence means."""
    out = []
    for s in sequences:
        total = s.weights.sum(dtype=np.float64)
        weights = s.weights / total if total > 0 else s.weights
        out.append(Sequence(s.ids, weights.astype(np.float32), s.segments, s.tokens, s.notes))
    return out


class EpochOrder(Sampler[int]):
    """A permutation that is a function of (seed, epoch) alone, so that a resumed run sees the same order."""

    def __init__(self, length: int, seed: int, epoch: int = 0) -> None:
        self.length, self.seed, self.epoch = length, seed, epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return iter(order.tolist())


def _weightless(forest: Forest) -> Forest:
    ids = forest.token[forest.paths[0]][:2]
    return Forest.of([Sequence(ids, np.zeros(len(ids), np.float32))])
