"""What is asked of a model: [x, y] as token sequences with the part of each that counts, in bounded windows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..choices import ScoreOverflow, require_choice
from ..encoder.weigh import UNTRAINED_FIRST
from ..errors import ConfigError, RowError
from ..forest import Forest
from ..rows.formats import Conversation, Pair
from ..rows.values import text
from ..sequence import Segment, Sequence

WINDOW = 32_768  # distinct tokens of one window
FORMS = "give a text, (x, y), (x, [y, ...]), a row as Encoder takes it, a Sequence or an Example"
NO_CONTEXT = "no log Pr(y): without a prompt and a BOS y's first token has no probability"
MOST = 64  # tokens of one window per distinct one that it has room for: each takes some hundred bytes


class ScoredPart(NamedTuple):
    """A sequence of which the tokens from `since` on count; those before are context alone."""

    sequence: Sequence
    since: int = 0


@dataclass(frozen=True)
class Request:
    """One [x, y]: its parts (several where it rolls through the context window), each token counted once.

    text: y's. truncated: tokens of x left out on the left. alone: y after the unconditional prompt instead of x.
    closing: the last part and one more token: what the model says of the place after the last token.
    """

    parts: tuple[ScoredPart, ...]
    text: str = ""
    truncated: int = 0
    alone: Sequence | None = None
    notes: tuple[str, ...] = ()
    closing: Sequence | None = None

    @property
    def sequences(self) -> list[Sequence]:
        """What the model reads for it."""
        return [p.sequence for p in self.parts] + [s for s in (self.closing, self.alone) if s is not None]

    def closed(self, token: int, limit: int | None) -> Request:
        """With a closing, where the model can read that far."""
        last = self.parts[-1].sequence
        if limit is not None and len(last) > limit:
            return self
        weights = np.zeros(len(last) + 1, np.float32)
        weights[-1] = 1
        return replace(self, closing=Sequence(np.append(last.ids, token), weights))


@dataclass(frozen=True)
class RequestBuilder:
    """Items to requests: text (x is empty), (x, y) or [x, y], (x, [y, ...]), a row, or what an encoder makes of one.

    limit: tokens that the model can read at once, None for any number. overflow: what happens to more:
    `refuse`, cut x on the `left`, `roll` through windows that overlap as little as they can, or `stride` through those
    that each count `stride` new tokens (by default half of the limit). window_bos: a BOS begins every window.
    unconditional: a text to stand in the place of x for log Pr(y). vocabulary: how many ids the model knows.
    Raises RowError for an item that can't be encoded or doesn't fit; ConfigError for an unknown overflow.
    """

    encoder: Any
    limit: int | None = None
    overflow: ScoreOverflow = "refuse"
    unconditional: str | None = None
    vocabulary: int | None = None
    stride: int | None = None
    window_bos: bool = False

    def __post_init__(self) -> None:
        require_choice("overflow", self.overflow, ScoreOverflow)
        self._check_windows()
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"max_length is {self.limit}", fix="give at least 1, or nothing for the model's own"
            )

    def _check_windows(self) -> None:
        if self.stride is not None and (
            self.overflow != "stride" or not 1 <= self.stride <= (self.limit or 1)
        ):
            what = f"stride is {self.stride}, overflow {self.overflow!r} and max_length {self.limit}"
            raise ConfigError(what, fix="overflow='stride' moves by 1 to max_length tokens")
        if self.window_bos and (self.overflow not in ("roll", "stride") or self.limit is None):
            raise ConfigError("window_bos without windows", fix="overflow='roll' or 'stride', and max_length")
        if self.window_bos and self.encoder.tokenizer.bos_token_id is None:
            raise ConfigError("window_bos, and the tokenizer has no BOS", fix="leave it out")

    def __call__(self, item: Any) -> list[Request]:
        """The requests of one item: one, or one per y or per turn that has a rendering of its own."""
        if isinstance(item, str):
            item = Pair("", text(item, "y"))
        if isinstance(item, Mapping | Conversation | Pair):
            y = item.y if isinstance(item, Pair) else None
            sequences = list(self._encoded(item))
            if isinstance(item, Conversation) and not any(s.output.any() for s in sequences):
                fix = "end the row with the assistant's message, or score its text as one: --format text"
                raise RowError("there is no reply to be scored", reason="no_reply", field="messages", fix=fix)
            return [self._request(s, y) for s in sequences]
        if isinstance(item, Sequence):
            return [self._request(item, None)]
        match item:
            case [str(x), str(y)]:
                return self(Pair(text(x, "x"), text(y, "y")))
            case [str(x), [*ys]] if all(isinstance(y, str) for y in ys):
                return [q for y in ys for q in self((x, y))]
        sequences = list(item) if isinstance(item, Iterable) else []
        if not sequences or not all(isinstance(s, Sequence) for s in sequences):
            raise RowError(_described(item), reason="wrong_type", fix=FORMS)
        return [self._request(s, None) for s in sequences]

    def _encoded(self, item: Mapping[str, Any] | Conversation | Pair) -> Iterator[Sequence]:
        """By the encoder, whose words about training are left out."""
        try:
            sequences = self.encoder(item).sequences
        except RowError as error:
            if error.reason != "nothing_trained":
                raise
            raise RowError(
                "it is one token, which has no probability: nothing stands before it",
                reason="no_context",
                where=error.where,
                fix="give more text, or bos=True, which puts a BOS there",
            ) from None
        return (replace(s, notes=tuple(n for n in s.notes if n != UNTRAINED_FIRST)) for s in sequences)

    def _request(self, sequence: Sequence, y: str | None) -> Request:
        self._refuse_unknown(sequence)
        y = _text(sequence) if y is None else y
        alone, notes = self._alone(y)
        request = Request((ScoredPart(sequence),), y, alone=alone, notes=(*sequence.notes, *notes))
        if self.limit is None or (len(sequence) - 1 <= self.limit and not self.window_bos):
            return request
        if self.overflow == "refuse":
            self._check(sequence, "it is")
        return self._cut(request) if self.overflow == "left" else self._roll(request)

    def _alone(self, y: str) -> tuple[Sequence | None, tuple[str, ...]]:
        """y after the unconditional prompt, and notes; None where there is no such prompt, and nothing to score."""
        if self.unconditional is None:
            return None, ()
        try:
            (alone,) = self._encoded(Pair(self.unconditional, y))
        except RowError as error:
            if self.unconditional or error.reason not in ("no_context", "empty_pair"):
                raise
            return None, (NO_CONTEXT,)
        self._check(alone, "the unconditional prompt and y are")
        return alone, tuple(f"unconditional: {n}" for n in alone.notes)

    def _refuse_unknown(self, sequence: Sequence) -> None:
        highest = int(sequence.ids.max(initial=0))
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise RowError(
                f"token id {highest} is unknown to the model, which has {self.vocabulary:,}",
                reason="bad_id",
                why="the tokenizer has tokens that were added after the model was made, or is another model's",
                fix="use the model's own tokenizer, or a model whose embeddings were resized and trained",
            )

    def _check(self, sequence: Sequence, what: str) -> None:
        if self.limit is not None and len(sequence) - 1 > self.limit:
            raise RowError(
                f"{what} {len(sequence):,} tokens long, and the model reads {self.limit:,}",
                reason="too_long",
                fix="overflow='left' cuts x on its left, 'roll' moves a window over the whole text",
            )

    def _cut(self, request: Request) -> Request:
        """x without its first tokens (a BOS stays); y whole. The last token is never read, so it is free."""
        assert self.limit is not None
        sequence = request.parts[0].sequence
        start, stop = _bos(sequence), len(sequence) - 1 - self.limit + _bos(sequence)
        first = stop + (not start)  # where there is no BOS, what stands first has no probability
        if sequence.output[start:first].any() or stop >= len(sequence):
            what = f"y doesn't fit into the {self.limit:,} tokens that the model reads"
            raise RowError(what, reason="y_too_long", fix="overflow='roll' scores y in windows")
        note = f"x lost {stop - start:,} tokens on its left: the model reads {self.limit:,}"
        cut = _without(sequence, start, stop)
        return replace(
            request, parts=(ScoredPart(cut),), truncated=stop - start, notes=(*request.notes, note)
        )  # fmt: skip

    def _roll(self, request: Request) -> Request:
        assert self.limit is not None
        sequence, limit = request.parts[0].sequence, self.limit - self.window_bos
        if limit < 1:
            raise ConfigError(f"a BOS fills windows of {self.limit} tokens", fix="raise max_length")
        stride = limit if self.overflow == "roll" else min(self.stride or max(1, self.limit // 2), limit)
        parts = tuple(
            self._window(_slice(sequence, a, b), since - a, first=a == 0)
            for a, since, b in rolling(len(sequence), limit, stride)
        )
        bos = ", each with a BOS before it" if self.window_bos else ""
        note = f"{len(parts)} windows of {self.limit:,} tokens that move by {stride:,}{bos}"
        note += ": context is shortest where one begins"
        return replace(request, parts=parts, notes=(*request.notes, note))

    def _window(self, sequence: Sequence, since: int, first: bool) -> ScoredPart:
        """A part; a BOS of its own stands in a later window, and in the first one where the text has none."""
        if not self.window_bos or (first and _bos(sequence)):
            return ScoredPart(sequence, since)
        moved = [replace(g, start=g.start + 1, stop=g.stop + 1) for g in sequence.segments]
        token = self.encoder.tokenizer.bos_token
        ids = np.concatenate(([self.encoder.tokenizer.bos_token_id], sequence.ids))
        segments = (Segment(0, 1, "bos"), *moved)
        begun = Sequence(
            ids, np.zeros(len(ids), np.float32), segments, (token, *sequence.tokens), sequence.notes
        )
        return ScoredPart(begun, 0 if first else since + 1)


def rolling(length: int, limit: int, stride: int | None = None) -> list[tuple[int, int, int]]:
    """Windows (start, since, stop) over a text of `length` tokens: tokens [since, stop) count in each.

    Every token counts once, in windows of at most limit + 1 tokens of which the last is never read. The first counts
    all of its tokens, later ones `stride` new ones, with all the context that fits before them. With stride = limit,
    the default, each begins with the last token that counted before it, as in lm-evaluation-harness; a stride of 1
    gives each token the longest context.
    """
    # 10 tokens with a limit of 4: (0, 0, 5), (4, 5, 9), (5, 9, 10). The first token counts with the first window,
    # though it has no context.
    bounds = [*range(min(1 + limit, length), length, stride or limit), length]
    return [(0, 0, bounds[0]), *((max(0, b - limit - 1), a, b) for a, b in pairwise(bounds))]


def windows(requests: Iterable[Request], tokens: int = WINDOW) -> Iterator[tuple[list[Request], Forest]]:
    """Neighbouring requests and the forest of their sequences; order is kept.

    Beyond its first request a window takes what adds up to `tokens` distinct ones, or to as many as that request
    has: a longer prompt is computed again only after as much that is new. However much they share, it holds at most
    MOST times that: memory is bounded.
    """
    window: list[Request] = []
    seen, raw, room, most = _SortedKeys(), 0, 0, 0
    for request in requests:
        # Whether a request fits is known once it is added; one that doesn't is added again to the keys of a new
        # window.
        length, added = sum(map(len, request.sequences)), seen.add(request)
        if window and (added > room or raw + length > most):
            yield window, _forest(window)
            window, seen, raw = [], _SortedKeys(), 0
            added = seen.add(request)
        if not window:
            room = max(tokens, length)
            most, added = MOST * room, 0
        window.append(request)
        raw, room = raw + length, room - added
    if window:
        yield window, _forest(window)


class _SortedKeys:
    """Token sequences, sorted: in any order of them none has a longer prefix in common than one of two neighbours."""

    def __init__(self) -> None:
        self.sorted: list[bytes] = []

    def add(self, request: Request) -> int:
        """Tokens that a request's sequences add to the forest."""
        return sum(self._add(s.ids.astype(np.uint32).tobytes()) for s in request.sequences)

    def _add(self, key: bytes) -> int:
        # In sorted order a key's longest common prefix is with the one before it or with the one after.
        at = bisect_left(self.sorted, key)
        shared = max((_common(key, k) for k in self.sorted[max(0, at - 1) : at + 1]), default=0)
        self.sorted.insert(at, key)
        return len(key) // 4 - shared


def _common(a: bytes, b: bytes) -> int:
    """Tokens that two keys begin with in common."""
    n = min(len(a), len(b)) // 4
    differs = np.frombuffer(a, np.uint32, n) != np.frombuffer(b, np.uint32, n)
    return int(differs.argmax()) if differs.any() else n


def _forest(window: list[Request]) -> Forest:
    return Forest.of([s for q in window for s in q.sequences])


def _described(item: Any) -> str:
    parts = f" of {', '.join(type(part).__name__ for part in item)}" if isinstance(item, tuple | list) else ""
    return f"it is a {type(item).__name__}{parts}"


def _text(sequence: Sequence) -> str:
    return "".join(t for t, out in zip(sequence.tokens, sequence.output, strict=False) if out)


def _bos(sequence: Sequence) -> int:
    return int(bool(sequence.segments) and sequence.segments[0].kind == "bos")


def _without(s: Sequence, start: int, stop: int) -> Sequence:
    """`s` without its tokens [start, stop)."""
    head, tail = _slice(s, 0, start), _slice(s, stop, len(s))
    moved = [replace(g, start=g.start + start, stop=g.stop + start) for g in tail.segments]
    return Sequence(
        np.concatenate((head.ids, tail.ids)),
        np.zeros(len(head) + len(tail), np.float32),
        (*head.segments, *moved),
        (*head.tokens, *tail.tokens),
        s.notes,
    )


def _slice(s: Sequence, start: int, stop: int) -> Sequence:
    """Tokens [start, stop) for scoring: no weights."""
    segments = [
        replace(g, start=max(g.start, start) - start, stop=min(g.stop, stop) - start)
        for g in s.segments
        if g.start < stop and g.stop > start
    ]
    return Sequence(
        s.ids[start:stop],
        np.zeros(stop - start, np.float32),
        tuple(segments),
        tuple(s.tokens[start:stop]),
        s.notes,
    )


def pair_of_ids(x: Iterable[int], y: Iterable[int]) -> Sequence:
    """A sequence whose y is named by ids."""
    x, y = list(x), list(y)
    n = len(x) + len(y)
    segments = (Segment(0, len(x), "prompt"), Segment(len(x), n, "answer", output=True))
    return Sequence(np.array(x + y, np.int64), np.zeros(n, np.float32), segments)
