"""`ygx pack --dry-run`: what sharing can bring for some rows, and what packs of a size reach of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..encoded import EncodedRows
from ..errors import ConfigError
from ..packing import prefix_order
from ..sequence import RatedExample
from ..show import plural
from ..training.packs import plan_of
from ..training.rated import Objective, RatedPacks


@dataclass(frozen=True)
class PackSharing:
    """tokens: of all sequences; distinct: in one forest of all; packed: over all packs; trained: with a weight."""

    sequences: int
    tokens: int
    distinct: int
    packed: int
    packs: int
    trained: int
    longest: int
    max_tokens: int

    @property
    def limit(self) -> float:
        """How many times as fast sharing alone can make a step, where all tokens cost the same."""
        return self.tokens / self.distinct

    @property
    def reached(self) -> float:
        """The same for these packs."""
        return self.tokens / self.packed

    def to_dict(self) -> dict[str, float]:
        return {**vars(self), "limit": self.limit, "reached": self.reached}

    def __str__(self) -> str:
        return (
            f"{plural(self.sequences, 'sequence')} of {self.tokens:,} tokens, {self.distinct:,} of them distinct; "
            f"{self.trained / self.tokens:.1%} trained; the longest has {self.longest:,}\n"
            f"sharing limit {self.limit:.2f}; {plural(self.packs, 'pack')} of {self.max_tokens:,} distinct tokens "
            f"reach {self.reached:.2f} ({self.reached / self.limit:.0%} of the limit)"
        )


def sharing_of(examples: list[Any], max_tokens: int) -> PackSharing:
    """Of encoded rows, rated ones in packs of whole rows. Raises ConfigError without any."""
    if not examples:
        raise ConfigError("no row was accepted", fix="the reasons are above; try `ygx show`")
    sequences = [s for example in examples for s in example]
    rows = EncodedRows.of(sequences)
    _, shared = prefix_order(rows.length, rows.read)
    if isinstance(examples[0], RatedExample):
        # Which objective is the same for packs; this one leaves no row out.
        rated = RatedPacks(examples, objective=Objective("reward_weighted"), max_tokens=max_tokens, seed=0)
        sizes = [len(item["forest"]) for item in (rated[i] for i in range(len(rated)))]
    else:
        sizes = plan_of(rows, max_tokens).distinct.tolist()
    tokens = int(rows.length.sum())
    return PackSharing(
        len(sequences), tokens, tokens - int(shared.sum()), sum(sizes), len(sizes), int(rows.trained.sum()),
        int(rows.length.max()), max_tokens,
    )  # fmt: skip
