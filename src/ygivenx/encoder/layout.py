"""From characters to tokens: which segment each token of a rendered conversation belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..sequence import Segment
from .contract import Draft, Turn
from .template import REASONING_FIELDS, Source
from .tokens import Encoded

Messages = Sequence[Mapping[str, Any]]
Piece = tuple[int, int, Source | None]  # characters [start, stop), source: None for the template's own
Run = tuple[int, str, bool, int | None]  # its first character, kind, output, message

_KIND_OF_ROLE = {"assistant": "answer", "function": "tool", "ipython": "tool"}


def segments_of(
    draft: Draft, encoded: Encoded, borders: Mapping[int, int], messages: Messages
) -> list[Segment]:
    """Segments over all tokens. `borders`: index of the token at each turn's start, end and stop.

    A token belongs to the run of its first character; the borders of outputs are exact.
    """
    runs = _merged(_runs(draft, messages))
    if encoded.tiled:
        at = np.searchsorted(encoded.starts, np.array([r[0] for r in runs])).tolist()
    else:
        at = _by_borders(runs, borders)
    at = [borders.get(run[0], i) for run, i in zip(runs, at, strict=True)]
    ends = pairwise([*at, len(encoded.ids)])
    return [
        Segment(first, last, *run[1:]) for (first, last), run in zip(ends, runs, strict=True) if first < last
    ]


def _by_borders(runs: list[Run], borders: Mapping[int, int]) -> list[int]:
    """Without offsets only the borders of turns are known: what lies between them is one segment."""
    at, known = [], 0
    for run in runs:
        known = borders.get(run[0], known)
        at.append(known)
    return at


def _merged(runs: list[Run]) -> list[Run]:
    return runs[:1] + [b for a, b in pairwise(runs) if a[1:] != b[1:]]


def _runs(draft: Draft, messages: Messages) -> list[Run]:
    pieces = _pieces(draft)
    runs: list[Run] = []
    done = 0
    for turn in draft.turns:
        runs += _outside(_between(pieces, done, turn.start), messages)
        runs += _inside(draft.text, turn, _between(pieces, turn.start, turn.end))
        done = turn.stop
    return runs + _outside(_between(pieces, done, len(draft.text)), messages)


def _pieces(draft: Draft) -> list[Piece]:
    """The whole text by source; one piece where origins aren't known."""
    pieces: list[Piece] = []
    at = 0
    if draft.traced is not None:
        for stop, s in draft.traced.text.runs:
            pieces.append((at, stop, draft.traced.sources[s] if s else None))
            at = stop
    if at < len(draft.text):  # unknown, or a header that was appended
        pieces.append((at, len(draft.text), None))
    return pieces


def _between(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    return [(max(a, start), min(b, stop), s) for a, b, s in pieces if a < stop and b > start]


def _outside(pieces: list[Piece], messages: Messages) -> list[Run]:
    return [(a, *_context(source, messages)) for a, _, source in pieces]


def _context(source: Source | None, messages: Messages) -> tuple[str, bool, int | None]:
    """Kind, output, message of what isn't output. A header's role is the template's, tools are the system's."""
    if source is None or source.field == "role":
        return "template", False, None
    if source.message is None:
        return "system", False, None
    role = str(messages[source.message].get("role"))
    kind = _field_kind(source.field) if role == "assistant" else _KIND_OF_ROLE.get(role, role)
    return kind, False, source.message


def _field_kind(field: str | None) -> str:
    if field in REASONING_FIELDS:
        return "reasoning"
    return "tool_call" if field == "tool_calls" else "answer"


def _inside(text: str, turn: Turn, pieces: list[Piece]) -> list[Run]:
    """The output's runs: each field, and the text around it with the field that it marks up."""
    runs: list[Run] = []
    at, before = turn.start, ""
    for a, b, source in pieces:
        if source is None or source.message != turn.message:
            continue
        kind = _field_kind(source.field)
        if at < a and before == "reasoning" != kind:  # `</think>` is the thought's, `<tool_call>` the call's
            opener = text.find("<", max(text.find(">", at, a), at), a) if kind == "tool_call" else -1
            runs.append((at, before, True, turn.message))
            at = opener if opener >= 0 else a
        if at < a:
            runs.append((at, kind, True, turn.message))
        runs.append((a, kind, True, turn.message))
        at, before = b, kind
    if at < turn.end:
        runs.append((at, before or "answer", True, turn.message))
    return [*runs, (turn.end, "end_of_turn", True, turn.message)]
