"""The nouns between a row and a forest: Segment, Sequence, Example, RatedExample, Rejected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .show import coloured

# Kinds of segments, in the field's terms. A role of its own (developer, critic, ...) is its own kind.
KINDS = (
    "bos", "template", "system", "user", "tool", "prompt",
    "reasoning", "answer", "tool_call", "end_of_turn",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of one kind.

    `output` says that the model itself has to produce them (they are part of some y);
    `message` is the index of the message that they come from, None for none.
    """

    start: int
    stop: int
    kind: str
    output: bool = False
    message: int | None = None


class Logged(NamedTuple):
    """log_probs: float32 [T], log Pr of each token when it was sampled, NaN where none was logged. advantages: float32
    [T] of any sign. reward: of the whole reply. None without any.
    """

    log_probs: npt.NDArray[np.float32] | None = None
    advantages: npt.NDArray[np.float32] | None = None
    reward: float | None = None

    def first(self, length: int) -> Logged:
        """Of the first so many tokens."""
        log_probs, advantages = (None if v is None else v[:length] for v in (self.log_probs, self.advantages))
        return Logged(log_probs, advantages, self.reward)


@dataclass(frozen=True)
class Sequence:
    """Token ids with the weight of each token as a target.

    ids: int64 [T]. weights: float32 [T]; weights[i] multiplies −log Pr(ids[i] | ids[:i]), so the first is 0.
    segments partition [0, T) in order. tokens: the text of each token, for people. notes: what a reader
    has to know (a repair, a moved border, a rendering that differs from inference). cut: how many tokens, and how many
    trained ones, its row lost by max_length. logged: what came with a row of token ids.
    """

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    segments: tuple[Segment, ...] = ()
    tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cut: tuple[int, int] = (0, 0)
    logged: Logged = field(default_factory=Logged)

    def __post_init__(self) -> None:
        # Copies: freezing them below leaves the caller's own arrays as they were.
        ids = np.asarray(self.ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise ValueError(
                f"ids must be whole numbers, got {ids.dtype}: rounded ones would name other tokens"
            )
        ids = ids.astype(np.int64)
        weights = np.array(self.weights, dtype=np.float32)
        if ids.ndim != 1 or ids.shape != weights.shape:
            raise ValueError(
                f"ids and weights must be 1-D of one length, got {ids.shape} and {weights.shape}"
            )
        if len(weights) and weights[0] != 0:
            raise ValueError("the first token has no context to be predicted from: its weight must be 0")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("weights must be finite and not negative")
        ids.flags.writeable = weights.flags.writeable = False
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "weights", weights)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """A view for other trainers: the id where a token is trained, else −100. int64 [T]."""
        return np.where(self.weights > 0, self.ids, -100)

    @property
    def output(self) -> npt.NDArray[np.bool_]:
        """bool [T]: the tokens of y, trained or not. Without segments, those with a weight."""
        if not self.segments:
            return self.weights > 0
        mask = np.zeros(len(self), bool)
        for segment in self.segments:
            mask[segment.start : segment.stop] = segment.output
        return mask

    def of_kind(self, kind: str) -> npt.NDArray[np.bool_]:
        """bool [T]: the tokens of segments of this kind."""
        mask = np.zeros(len(self), bool)
        for segment in self.segments:
            mask[segment.start : segment.stop] = segment.kind == kind
        return mask

    @property
    def trained(self) -> list[str]:
        """The text of the trained tokens, in order."""
        return [t for t, w in zip(self.tokens, self.weights, strict=True) if w > 0]

    def __str__(self) -> str:
        return coloured(self.tokens or [f"<{i}>" for i in self.ids], self.weights, self.notes)


@dataclass(frozen=True)
class Example:
    """A row as the sequences that train it: one, or one per turn where the template rewrites history.

    index: the row's number among all that were read, from 0; None where it was encoded alone.
    """

    sequences: tuple[Sequence, ...]
    row: Any = None
    notes: tuple[str, ...] = field(default=())
    index: int | None = None

    @property
    def only(self) -> Sequence:
        """The one sequence; raises ValueError where there are several."""
        if len(self.sequences) != 1:
            raise ValueError(
                f"this example has {len(self.sequences)} sequences, one per turn: use .sequences"
            )
        return self.sequences[0]

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self.only.ids

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        return self.only.weights

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.only.segments

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.only.tokens

    @property
    def trained(self) -> list[str]:
        return [t for s in self.sequences for t in s.trained]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)

    def __str__(self) -> str:
        return "\n".join(map(str, self.sequences))


@dataclass(frozen=True)
class RatedExample:
    """A row as replies to one prompt, each an Example, with a number that says how good each is.

    rewards: of a preference 1 and −1, of a label 1 or −1, else the row's own numbers; the higher, the better.
    weight: a factor of the row's loss. names: what the replies are called in messages. index: as in Example.
    """

    replies: tuple[Example, ...]
    rewards: tuple[float, ...]
    weight: float = 1.0
    names: tuple[str, ...] = ()
    row: Any = None
    index: int | None = None

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences of all replies, in order."""
        return tuple(s for reply in self.replies for s in reply)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for any two replies of different rewards, by their places."""
        r = self.rewards
        both = ((a, b) if r[a] > r[b] else (b, a) for a, b in combinations(range(len(r)), 2))
        return [(a, b) for a, b in both if r[a] > r[b]]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)

    def __str__(self) -> str:
        rated = zip(self.names, self.rewards, self.replies, strict=True)
        return "\n".join(f"{name} ({reward:g}): {reply}" for name, reward, reply in rated)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that can't be used: `reason` is a stable code, `where` the place, `message` the whole error."""

    row: Any
    reason: str
    where: str
    message: str
