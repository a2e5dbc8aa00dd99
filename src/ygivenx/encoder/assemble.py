"""What chats and pairs have in common: options, a row on its way through the tokenizer, and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import RowError
from ..sequence import Segment, Sequence
from .policy import Policy
from .tokens import Encoded, Tokens

UNTRAINED_FIRST = "the first token has no context to be predicted from: it isn't trained"


@dataclass(frozen=True)
class Options:
    """The encoder's options; see `Encoder`."""

    tokens: Tokens
    policy: Policy
    control: str = "refuse"
    border: str = "refuse"
    context: str = "inference"
    dropped: str = "refuse"
    repairs: frozenset[str] = frozenset()
    max_length: int | None = None
    overflow: str = "refuse"
    thoughts: str = "as_written"
    bos: bool | str = "auto"
    eos: bool | str = "auto"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)


class Work(Protocol):
    """A row on its way through the tokenizer: texts to encode, each with the characters where it is cut."""

    @property
    def texts(self) -> list[tuple[str, tuple[int, ...]]]: ...
    def finish(self, parts: list[Encoded]) -> list[Sequence]:
        """The sequences of the encoded texts; raises RowError."""
        ...


@dataclass(frozen=True)
class Job:
    """The work of a row that is encoded in one way alone."""

    texts: list[tuple[str, tuple[int, ...]]]
    make: Callable[[list[Encoded]], list[Sequence]]

    def finish(self, parts: list[Encoded]) -> list[Sequence]:
        """See `Work`."""
        return self.make(parts)


def sequence_of(
    ids: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
    segments: Iterable[Segment],
    tokens: Any,
    notes: tuple[str, ...],
) -> Sequence:
    """A sequence; its first token has no weight."""
    if weights[:1].any():
        weights[:1] = 0
        notes += (UNTRAINED_FIRST,)
    return Sequence(ids, weights, tuple(s for s in segments if s.stop > s.start), tokens, notes)


def fitted(sequences: list[Sequence], most: int | None, overflow: str) -> list[Sequence]:
    """The sequences that train something, each of at most `most` tokens; what is left out is noted.

    Raises RowError `nothing_trained`, and `too_long` where one is and overflow isn't "truncate" or that leaves nothing.
    """
    trained = [s for s in sequences if s.weights.any()]
    if not trained:
        raise _nothing_trained(sequences)
    left_out_notes = dict.fromkeys(n for s in sequences if not s.weights.any() for n in s.notes)
    if left_out_notes:
        trained[0] = replace(trained[0], notes=tuple(dict.fromkeys((*trained[0].notes, *left_out_notes))))
    long = [s for s in trained if most is not None and len(s) > most]
    if most is None or not long:
        return trained
    if overflow == "drop_reply":
        return _with_whole_replies(trained, most)
    if overflow != "truncate":
        raise too_long(long[0], most)
    kept = [s for s in trained if s.weights[:most].any()]
    if not kept:
        raise too_long(long[0], most, "nothing that is trained stands before that")
    cut = [_truncated(s, most) if len(s) > most else s for s in kept]
    if left_out := len(trained) - len(kept):
        lost = sum(int((s.weights > 0).sum()) for s in trained if not s.weights[:most].any())
        note = f"{left_out} later turns with nothing to train in {most} tokens are left out"
        cut[-1] = replace(cut[-1], notes=(*cut[-1].notes, f"{note}: {lost} trained tokens lost"))
    return cut


def _with_whole_replies(sequences: list[Sequence], most: int) -> list[Sequence]:
    """Each sequence up to `most` tokens, replies that don't fit whole without weight; raises RowError `too_long`."""
    fitting = [_without_cut_reply(s, most) for s in sequences]
    kept = [s for s in fitting if s.weights.any()]
    if not kept:
        raise too_long(min(sequences, key=len), most, "no reply stands whole before that")
    if left_out := len(fitting) - len(kept):
        lost = sum(
            int((s.weights > 0).sum()) for s, f in zip(sequences, fitting, strict=True) if not f.weights.any()
        )
        note = (
            f"{left_out} later turns that don't fit in {most} tokens are left out: {lost} trained tokens lost"
        )
        kept[-1] = replace(kept[-1], notes=(*kept[-1].notes, note))
    return kept


def _without_cut_reply(sequence: Sequence, most: int) -> Sequence:
    """The first `most` tokens of a longer sequence; a reply that reaches further is context, with a note."""
    if len(sequence) <= most:
        return sequence
    cut = {s.message for s in sequence.segments if s.output and s.stop > most}
    weights = sequence.weights[:most].copy()
    segments = []
    for s in sequence.segments:
        if s.start < most:
            is_context = s.output and s.message in cut
            weights[s.start : s.stop] *= not is_context
            segments.append(
                Segment(s.start, min(s.stop, most), s.kind, s.output and not is_context, s.message)
            )
    lost = int((sequence.weights > 0).sum() - (weights > 0).sum())
    note = f"cut from {len(sequence)} to {most} tokens: {len(cut)} replies that don't fit are context, "
    note += f"{lost} trained tokens lost"
    return sequence_of(
        sequence.ids[:most], weights, segments, sequence.tokens[:most], (*sequence.notes, note)
    )


def _nothing_trained(sequences: list[Sequence]) -> RowError:
    why, fix = "", "check train=, the messages' weights, and that the row has a reply"
    if any(UNTRAINED_FIRST in s.notes for s in sequences):
        why = "the only one with a weight is the first, which has no context to be predicted from"
        fix = "put a BOS before it: bos=True (--bos always)"
    return RowError("no token of this row is trained", reason="nothing_trained", why=why, fix=fix)


def _truncated(sequence: Sequence, length: int) -> Sequence:
    """The first `length` tokens, with a note of what that cost."""
    weights = sequence.weights[:length].copy()
    lost = int((sequence.weights[length:] > 0).sum())
    note = f"truncated from {len(sequence)} to {length} tokens: {lost} trained tokens lost"
    segments = [
        Segment(s.start, min(s.stop, length), s.kind, s.output, s.message)
        for s in sequence.segments
        if s.start < length
    ]
    return sequence_of(
        sequence.ids[:length], weights, segments, sequence.tokens[:length], (*sequence.notes, note)
    )


def too_long(sequence: Sequence, most: int, why: str = "") -> RowError:
    return RowError(
        f"{len(sequence)} tokens, more than max_length={most}",
        reason="too_long",
        why=why,
        fix="raise max_length, or overflow='drop_turns' (whole oldest turns), 'drop_reply' (replies that don't fit) "
        "or 'truncate'",
    )
