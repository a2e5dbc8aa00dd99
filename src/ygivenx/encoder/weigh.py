"""Stage 4, weigh: the sequences of a row, each token with its weight, and their length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import RowError
from ..rows.nouns import Conversation
from ..sequence import Segment, Sequence
from .content import refuse_alike
from .render import Candidate, Chat, Outline
from .segments import apply_spans, encoded_apart, segments_of, with_thoughts
from .tokenize import Encoded, Pieces, borders_of

UNTRAINED_FIRST = "the first token has no context to be predicted from: it isn't trained"


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
    # What is noted on a sequence that goes is kept on the first that stays.
    trained = [s for s in sequences if s.weights.any()]
    if not trained:
        raise _nothing_trained(sequences)
    left_out_notes = dict.fromkeys(n for s in sequences if not s.weights.any() for n in s.notes)
    if left_out_notes:
        trained[0] = replace(trained[0], notes=tuple(dict.fromkeys((*trained[0].notes, *left_out_notes))))
    long = [s for s in trained if most is not None and len(s) > most]
    if most is None or not long:
        return trained
    if overflow not in ("drop_reply", "truncate"):
        raise too_long(long[0], most)
    whole = overflow == "drop_reply"
    cut = [_cut(s, most, whole) if len(s) > most else s for s in trained]
    kept = [s for s in cut if s.weights.any()]
    if not kept:
        why = "no reply stands whole before that" if whole else "nothing that is trained stands before that"
        raise too_long(min(trained, key=len) if whole else long[0], most, why)
    if left_out := len(cut) - len(kept):
        lost = sum(_trained(s) for s, c in zip(trained, cut, strict=True) if not c.weights.any())
        what = "that don't fit" if whole else "with nothing to train"
        note = f"{left_out} later turns {what} in {most} tokens are left out: {lost} trained tokens lost"
        kept[-1] = replace(kept[-1], notes=(*kept[-1].notes, note))
    return counted(kept, trained)


def _trained(sequence: Sequence) -> int:
    return int((sequence.weights > 0).sum())


def counted(kept: list[Sequence], whole: list[Sequence]) -> list[Sequence]:
    """The sequences that are kept of a row; the last one says how many tokens, and trained ones, the row lost."""
    tokens = sum(map(len, whole)) - sum(map(len, kept))
    trained = sum(map(_trained, whole)) - sum(map(_trained, kept))
    return [*kept[:-1], replace(kept[-1], cut=(max(tokens, 0), max(trained, 0)))]


def _cut(sequence: Sequence, most: int, whole: bool) -> Sequence:
    """The first `most` tokens of a longer sequence, with a note of what that cost.

    whole: a reply that reaches further is context.
    """
    cut = {s.message for s in sequence.segments if whole and s.output and s.stop > most}
    weights, segments = sequence.weights[:most].copy(), []
    for s in (s for s in sequence.segments if s.start < most):
        is_context = s.output and s.message in cut
        weights[s.start : s.stop] *= not is_context
        segments.append(Segment(s.start, min(s.stop, most), s.kind, s.output and not is_context, s.message))
    note = f"{'cut' if whole else 'truncated'} from {len(sequence)} to {most} tokens: "
    note += f"{len(cut)} replies that don't fit are context, " if whole else ""
    note += f"{_trained(sequence) - int((weights > 0).sum())} trained tokens lost"
    short = sequence_of(
        sequence.ids[:most], weights, segments, sequence.tokens[:most], (*sequence.notes, note)
    )
    return replace(short, logged=sequence.logged.first(most))


def no_reply() -> RowError:
    """A conversation in which nobody answers."""
    return RowError(
        "this conversation has no assistant message",
        reason="nothing_trained",
        field="messages",
        why="only what the assistant says is trained",
        fix="give the reply, or name another role to be trained: train='roles=user'",
    )


def _nothing_trained(sequences: list[Sequence]) -> RowError:
    why, fix = "", "check train=, the messages' weights, and that the row has a reply"
    if any(UNTRAINED_FIRST in s.notes for s in sequences):
        why = "the only one with a weight is the first, which has no context to be predicted from"
        fix = "put a BOS before it: bos=True (--bos always)"
    return RowError("no token of this row is trained", reason="nothing_trained", why=why, fix=fix)


def too_long(sequence: Sequence, most: int, why: str = "") -> RowError:
    return RowError(
        f"{len(sequence)} tokens, more than max_length={most}",
        reason="too_long",
        why=why,
        fix="raise max_length, or overflow='drop_turns' (whole oldest turns), 'drop_reply' (replies that don't fit) "
        "or 'truncate'",
    )


# === conversations =======================================================================================


def sequences_of(
    chat: Chat, found: Candidate, parts: list[Encoded], notes: tuple[str, ...], border: str
) -> list[Sequence]:
    """The sequences of a candidate with its ids; raises RowError `straddling_token` where these don't fit."""
    options, sequences = chat.options, list[Sequence]()
    texts: Iterable[tuple[Outline, Encoded]] = zip(found.outlines, parts, strict=True)
    for outline, encoded in encoded_apart(texts, options) if border == "split" else texts:
        if options.control != "parse":
            given = {"messages": chat.row.messages, "tools": chat.row.tools, "documents": chat.row.documents}
            refuse_alike(options.tokens, encoded, given)
        outline = with_thoughts(outline, chat.tags, options.thoughts == "empty_masked")
        borders = borders_of(outline, encoded, options, border)
        segments = segments_of(outline, encoded, borders)
        weights = _weights(chat, segments, len(encoded.ids))
        of_spans = apply_spans(weights, segments, encoded, chat.row.messages)
        if sequences:
            # What an earlier sequence has already weighed: no reply of this one, even if it begins alike.
            # A row of several turns has several sequences, and the context of a later one repeats the earlier: each
            # token is weighed once.
            own = min((borders[start] for _, start, _, _ in outline.turns), default=len(weights))
            known = max(_common(s.ids, encoded.ids) for s in sequences)
            weights[: min(own, known)] = 0
        pieces = Pieces(encoded.text, encoded.starts, encoded.stops)
        all_notes = (*notes, *outline.notes, *of_spans, *found.notes)
        sequences.append(sequence_of(encoded.ids, weights, segments, pieces, all_notes))
    is_asked = any(m.get("role") == "assistant" for m in chat.row.messages)
    if not is_asked and not any(s.weights.any() for s in sequences):
        raise no_reply()
    return fitted(sequences, options.max_length, options.overflow)


def _weights(chat: Chat, segments: list[Segment], length: int) -> npt.NDArray[np.float32]:
    row, weights, weigh = chat.row, np.zeros(length, np.float32), chat.options.weigh
    last = max((i for i, m in enumerate(row.messages) if m.get("role") == "assistant"), default=-1)
    for s in segments:
        message: Mapping[str, Any] = row.messages[s.message] if s.message is not None else {}
        part = (
            s.kind,
            s.output,
            s.message,
            message.get("role"),
            s.message == last,
            message.get("weight", 1.0),
        )
        weights[s.start : s.stop] = weigh(*part)
    return weights * np.float32(row.weight)


def _common(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    """The length of the common prefix of two arrays."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


# === shorter rows ========================================================================================


def shorter_rows(row: Conversation) -> Iterator[tuple[Conversation, int, int, int]]:
    """The row without its oldest turns, as few as can be first; what stands before the first user stays.

    Each with how many turns are dropped, and of how many; and how many messages stand before those that are.
    """
    first, *later = _turns(row.messages) or [0]
    for n, start in enumerate(later, 1):
        yield replace(row, messages=row.messages[:first] + row.messages[start:]), n, 1 + len(later), first


def _turns(messages: Iterable[Mapping[str, Any]]) -> list[int]:
    """Where turns begin: the first at the first user; each other after a reply or a call's result, if a user speaks
    before the next one."""
    begins: list[int] = []
    start = 0
    for i, role in enumerate(m.get("role") for m in messages):
        if role in ("assistant", "tool"):
            start = i + 1
        elif role == "user" and not begins:
            begins, start = [i], i
        elif role == "user" and start > begins[-1]:
            begins.append(start)
    return begins


def renumbered(sequence: Sequence, first: int, dropped_messages: int) -> Sequence:
    """The sequence with the messages from `first` on numbered as they are in the row, where more stand before them."""
    segments = (
        replace(s, message=s.message + dropped_messages)
        if s.message is not None and s.message >= first
        else s
        for s in sequence.segments
    )
    return replace(sequence, segments=tuple(segments))
