"""What a row means: a conversation, a pair of texts, replies that are rated, or token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..sequence import Logged, Segment, Sequence

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template reads them, with the further arguments of the template.

    A message may have a `weight` (a factor of all its tokens) and `spans`, a list of
    `{"start", "stop", "weight"}`: the characters [start, stop) of its content have that weight, all other
    characters of the content have none.

    weight: a factor of all weights of the row.
    continue_final_message: the last message is a reply that was left open: it has no end of turn.
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts as the model reads them, y right after x, without a template; `weight` is a factor of all weights."""

    x: str
    y: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt with a better reply and a worse one: each is the whole conversation or pair, prompt included.

    weight: a factor of the row's loss.
    """

    chosen: Conversation | Pair
    rejected: Conversation | Pair
    weight: float = 1.0

    @property
    def rated(self) -> Rated:
        """The same as two rated replies, of 1 and −1."""
        return Rated((self.chosen, self.rejected), (1.0, -1.0), self.weight, ("chosen", "rejected"))


@dataclass(frozen=True, slots=True)
class Rated:
    """Replies to one prompt, each with a number that says how good it is: the higher, the better.

    replies: each is the whole conversation or pair, prompt included, or token ids. rewards: a number for each reply;
    a label that says yes or no is 1 or −1. weight: a factor of the row's loss. names: what the replies are called.
    """

    replies: tuple[Conversation | Pair | TokenRow, ...]
    rewards: tuple[float, ...]
    weight: float = 1.0
    names: tuple[str, ...] = ("reply",)


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """A row of token ids, as a sampler or a tokenizer wrote them: nothing is encoded again.

    ids: int64 [T]. weights: float32 [T], the weight of each token as a target.
    prompt_length: the first so many tokens are x by the row's columns; a policy may still weigh them. Of later
    tokens those of weight 0 are context, such as the result of a tool.
    log_probs: float32 [T], log Pr of each token when it was sampled; NaN where the row has none; None without any.
    advantages: float32 [T] of any sign, 0 outside of y; None without any. reward: of the whole row.
    """

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    prompt_length: int = 0
    log_probs: npt.NDArray[np.float32] | None = None
    advantages: npt.NDArray[np.float32] | None = None
    reward: float | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def sequence(self) -> Sequence:
        """The same ids and weights as a Sequence; no tokenizer is asked."""
        return Sequence(self.ids, self.weights, self.segments(), notes=self.notes, logged=self.logged)

    @property
    def logged(self) -> Logged:
        return Logged(self.log_probs, self.advantages, self.reward)

    def segments(self) -> tuple[Segment, ...]:
        """The prompt, then runs of tokens that the model produced and of context between them."""
        output = self.weights > 0
        output[: self.prompt_length] = False
        if len(output) > 1 and self.prompt_length == 0:
            output[0] = output[1]  # the first token of a text is its beginning, though nothing predicts it
        changes = np.flatnonzero(output[1:] != output[:-1]) + 1
        borders = [0, *changes.tolist(), len(output)]
        return tuple(
            Segment(a, b, "answer" if output[a] else "prompt", bool(output[a]))
            for a, b in pairwise(borders)
            if a < b
        )
