"""Sequences in packs, each a forest and one micro-batch, and the order in which epochs see them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from ..choices import Denominator
from ..encoded import EncodedRows
from ..forest import Forest, grown
from ..packing import Ints, PackPlan, joined, plan
from ..sequence import Sequence
from ..show import plural


class Packs(Dataset[dict[str, Any]]):
    """Sequences packed into forests; item i is {"forest": ..., "names": ...}, one micro-batch.

    rows: Examples, Sequences or EncodedRows, which may lie in a file: a forest is made when it is asked for. The names
    say for each sequence of a pack where it comes from. `skipped` counts packs without any weight: they would be steps
    that do nothing, so they are left out, never silently trained as 0/0.
    """

    def __init__(
        self, rows: Iterable[Any], *, max_tokens: int, seed: int, denominator: Denominator = "tokens"
    ) -> None:
        self.rows, self.denominator = EncodedRows.of(rows), denominator
        planned = plan_of(self.rows, max_tokens, seed)
        weight = planned.sums(self.rows.weight)
        self.plan = planned.only(np.flatnonzero(weight > 0))
        self.skipped, self.fillers = len(planned) - len(self.plan), 0

    def fill(self, ranks: int) -> None:
        """Every rank needs the same number of micro-batches: add packs that weigh nothing."""
        while len(self) % ranks:
            self.fillers += 1

    def __str__(self) -> str:
        seen = self.plan.members
        distinct, total = int(self.plan.distinct.sum()), int(self.rows.length[seen].sum())
        trained = int(self.rows.trained[seen].sum())
        return (
            f"{plural(len(seen), 'sequence')} in {plural(len(self), 'pack')}: {total:,} tokens, "
            f"{distinct:,} distinct (sharing {total / max(distinct, 1):.2f}), {trained / max(total, 1):.1%} trained"
            + (f"; {plural(self.skipped, 'pack')} without any weight left out" if self.skipped else "")
        )

    def __len__(self) -> int:
        return len(self.plan) + self.fillers

    def __getitem__(self, index: int) -> dict[str, Any]:
        if len(self.plan) <= index < len(self):
            return {"forest": self._weightless(), "names": ["a filler"]}
        members = self.plan[index]
        forest = grown(lambda i: weighed(self.rows.bare(i), self.denominator), members)
        return {"forest": forest, "names": list(map(self.rows.name, members))}

    def sequence(self, member: int) -> Sequence:
        """A member of a forest, with its segments and the weights that it is trained with."""
        return weighed(self.rows[member], self.denominator)

    def _weightless(self) -> Forest:
        ids = self.rows.bare(self.plan[0][0]).ids[:2]
        return Forest.of([Sequence(ids, np.zeros(len(ids), np.float32))])

    @property
    def fingerprint(self) -> str:
        """A hash over every token, weight and place: two equal ones train the same."""
        digest = hashlib.sha256(self.denominator.encode())
        for values in (self.rows.digest[self.plan.members], self.plan.bounds, np.array(self.fillers)):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


def plan_of(rows: EncodedRows, max_tokens: int, seed: int = 0) -> PackPlan:
    """The packs of all rows, and for those that are seen more than once further ones: no pack has a sequence twice."""
    rounds = [np.flatnonzero(rows.counts > n) for n in range(int(rows.counts.max(initial=0)))]
    return joined([_plan_of_some(rows, which, max_tokens, (seed, n)) for n, which in enumerate(rounds)])


def _plan_of_some(rows: EncodedRows, which: Ints, max_tokens: int, seed: tuple[int, int]) -> PackPlan:
    def read(some: Ints, start: int, stop: int) -> Any:
        return rows.read(which[some], start, stop)

    found = plan(rows.length[which], read, max_tokens, *seed)
    return PackPlan(which[found.members], found.bounds, found.distinct)


def weighed(s: Sequence, denominator: str) -> Sequence:
    """By sequence, each one's weights are divided by their sum: the loss becomes the mean of per-sequence means."""
    total = s.weights.sum(dtype=np.float64)
    if denominator != "sequence" or not total > 0:
        return s
    return replace(s, weights=(s.weights / total).astype(np.float32))


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
