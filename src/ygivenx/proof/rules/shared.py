"""What several rules use: masks over seen rows, and how hits are counted and located."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...choices import Severity
from ...sequence import Sequence
from ..evidence import (
    HISTORY,
    SILENT,
    UNKNOWN,
    Evidence,
    JoinedRows,
    MatchedStretch,
    ObservedRow,
    kinds_among,
)
from .base import Hit

EXAMPLES = 3
OPENING = ("bos", "template", "system")  # kinds of what stands before a first message
STRAY = 32  # a longer stretch that no known document explains is a document that the audit wasn't given


Mask = Callable[[ObservedRow], np.ndarray]


@dataclass
class MaskCount:
    count: int
    total: int
    examples: tuple[Mapping[str, str], ...]

    def hit(self, message: str) -> Hit:
        return Hit(message, self.count, self.total, self.examples)


def tokens(ev: Evidence, message: str, mask: Mask, of: Mask | None = None) -> Iterator[Hit]:
    yield collect(ev, mask, of=of).hit(message)


def located(
    ev: Evidence,
    message: str,
    found: list[tuple[str, Any]],
    of: int,
    severity: Severity | None = None,
    severity_of_all: Severity | None = None,
) -> Iterator[Hit]:
    """A hit for places, (where, a text or the ids of one), among `of`; of count 0 for none."""
    shown = [(where, text if isinstance(text, str) else ev.text(text)) for where, text in found[:EXAMPLES]]
    examples = tuple({"where": where, "text": text} for where, text in shown)
    yield Hit(message, len(found), of, examples, severity, severity_of_all)


def collect(
    ev: Evidence, mask: Mask, *, of: Mask | None = None, seen: list[ObservedRow] | None = None
) -> MaskCount:
    """Positions where `mask` holds, among those of `of` (default: the trained ones)."""
    joined = ev.tokens if seen is None else JoinedRows(seen)
    if not joined.rows:
        return MaskCount(0, 0, ())
    at = np.flatnonzero(mask(joined))
    total = int((joined.trained if of is None else of(joined)).sum())
    numbers, first = np.unique(joined.row_of(at), return_index=True)
    examples = []
    for number, token in zip(numbers[:EXAMPLES].tolist(), at[first[:EXAMPLES]].tolist(), strict=True):
        s, place = joined.rows[number], token - int(joined.starts[number])
        examples.append({"where": f"{s.where}, token {place}", "text": around(ev, s.ids, place)})
    return MaskCount(len(at), total, tuple(examples))


def around(ev: Evidence, ids: np.ndarray, at: int) -> str:
    before, after = ids[max(0, at - 8) : at], ids[at + 1 : at + 4]
    return f"{ev.text(before)}⟦{ev.text(ids[at : at + 1])}⟧{ev.text(after)}"


def of_kind(s: ObservedRow, *kinds: str) -> np.ndarray:
    return kinds_among(s.codes, kinds)


def supplied(s: ObservedRow) -> np.ndarray:
    """Trained tokens that the encoder gives no weight and the model doesn't have to produce."""
    return np.asarray(s.trained & (s.target == s.ids) & ~s.output & (s.expected == 0), bool)


def of_history(s: ObservedRow) -> np.ndarray:
    """Trained tokens of replies that are context here: the sequence that trains them shows another context."""
    return np.asarray(supplied(s) & (s.role == HISTORY) & ~of_kind(s, "reasoning"), bool)


def of_weight_zero(s: ObservedRow) -> np.ndarray:
    """Trained tokens of replies that their rows, or the policy, don't want trained."""
    silent = s.output | (s.role == SILENT)
    return np.asarray(s.trained & (s.target == s.ids) & silent & (s.expected == 0), bool)


def expected_y(s: ObservedRow) -> np.ndarray:
    expected = s.output & (s.expected > 0)
    expected[s.starts] = False
    return expected


def weighted_in(sequence: Sequence) -> np.ndarray:
    return sequence.weights > 0


def after_end(s: ObservedRow) -> np.ndarray:
    after = np.zeros(len(s.ids), bool)
    after[1:] = of_kind(s, "end_of_turn")[:-1]
    after[s.starts] = False
    return after


def misplaced(s: ObservedRow) -> np.ndarray:
    return np.asarray(s.trained & (s.ids >= 0) & (s.target != s.ids), bool)


def share_equal(seen: list[ObservedRow], back: int) -> float:
    """The share of misplaced targets that equal the token `back` places before the one they should be."""
    equal = [(np.roll(s.ids, back) == s.target)[misplaced(s)] for s in seen]
    return float(np.concatenate(equal).mean())


def parts_of(s: ObservedRow) -> list[slice]:
    """What should have a trained token: each aligned document with weight, else the row."""
    trained_y = expected_y(s)
    pieces = [slice(p.start, p.stop) for p in s.pieces if trained_y[p.start : p.stop].any()]
    return pieces or [slice(0, len(s.ids))]


def stray_tokens(s: ObservedRow) -> np.ndarray:
    """Tokens of an aligned row that no document explains, but for whole documents that weren't given.

    What has no id (a learned prompt's virtual tokens) is no text, and stands before x at inference, too.
    """
    stray = of_kind(s, UNKNOWN, "") & ~s.padding & (s.ids >= 0)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], stray.astype(np.int8), [0]))))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start > STRAY and not of_kind(s, UNKNOWN)[start:stop].any():
            stray[start:stop] = False
    return np.asarray(stray, bool)


def lost_tokens(piece: MatchedStretch) -> np.ndarray:
    """bool over a document's tokens: missing in its middle (a cut head or tail has rules of its own)."""
    lost = ~piece.matched
    lost[piece.missing_tail] = False
    if piece.missing_head > STRAY // 4 or lacks_opening(piece):
        lost[: piece.missing_head] = False
    return lost


def lacks_opening(piece: MatchedStretch) -> bool:
    """Whether a document lacks all that stands before its first message: a system prompt, a block of tools."""
    lost = [g for g in piece.sequence.segments if g.start < piece.missing_head]
    return bool(lost) and lost[-1].stop == piece.missing_head and {g.kind for g in lost} <= set(OPENING)


def only_last_reply(s: ObservedRow) -> np.ndarray:
    """bool [T]: tokens of earlier replies, where of each document nothing but its last reply is trained."""
    if not isinstance(s, JoinedRows):
        return _earlier_replies(s)
    return np.concatenate([_earlier_replies(row) for row in s.rows])


def _earlier_replies(s: ObservedRow) -> np.ndarray:
    earlier = np.zeros(len(s.ids), bool)
    expected = expected_y(s)
    if s.trained[expected].all():
        return earlier
    for p in s.pieces:
        here = expected[p.start : p.stop]
        starts = np.flatnonzero(here & ~np.append(False, here[:-1]))
        if len(starts) > 1:
            at = p.start + int(starts[-1])
            last = expected[at : p.stop]
            if not s.trained[p.start : at][here[: starts[-1]]].any() and s.trained[at : p.stop][last].all():
                earlier[p.start : at] = here[: starts[-1]]
    return earlier


def first_lost(s: ObservedRow) -> np.ndarray:
    """The first ids that a document of the row lost in its middle, none if it lost none."""
    lost = (p.sequence.ids[lost_tokens(p)][:12] for p in s.pieces)
    return next((ids for ids in lost if len(ids)), np.zeros(0, np.int64))


def leaks_of(ev: Evidence, what: str, message: str) -> Iterator[Hit]:
    found = [leak for leak in ev.leaks if leak.what == what]
    if found:
        examples = tuple(
            {"where": k.where, "text": f"gradient {k.size:.2g} of their own"} for k in found[:EXAMPLES]
        )
        yield Hit(message, len(found), examples=examples)


def spread_of(ev: Evidence, weights: list[float]) -> float:
    """Largest over smallest weight; 1 where weights depend on tokens anyway."""
    uneven = ev.probe is not None and ev.probe.weighting == "probability"
    positive = [w for w in weights if w > 0]
    return 1.0 if uneven or len(positive) < 2 else max(positive) / min(positive)


def some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", …" if len(numbers) > 4 else "")
