"""From characters to tokens: which segment each token of a rendered conversation belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .contract import Draft, Turn
from .sequence import Segment
from .template import REASONING_FIELDS, Source
from .tokens import Encoded

Span = Segment
Run = tuple[int, int, str, bool, int | None]  # characters [start, stop), kind, output, message


def spans_of(
    draft: Draft,
    encoded: Encoded,
    borders: Mapping[int, int | None],
    messages: Sequence[Mapping[str, Any]],
) -> list[Span]:
    """Segments over all tokens. `borders`: token index by character, of each turn's start and stop.

    A token belongs to the run of its first character; the borders of outputs are exact.
    """
    runs = _outside_and_inside(draft, messages)
    starts = [r[0] for r in runs]
    at = (
        np.searchsorted(encoded.starts, starts)
        if encoded.tiled
        else _by_borders(runs, borders, len(encoded.ids))
    )
    spans: list[Span] = []
    for (first, last), (start, _, kind, output, message) in zip(
        pairwise([*map(int, at), len(encoded.ids)]), runs, strict=True
    ):
        first = borders.get(start, first) or first
        if first >= last:
            continue
        if spans and (spans[-1].kind, spans[-1].output, spans[-1].message) == (kind, output, message):
            spans[-1] = Segment(spans[-1].start, last, kind, output, message)
        else:
            spans.append(Segment(first, last, kind, output, message))
    return spans


def _by_borders(runs: list[Run], borders: Mapping[int, int | None], tokens: int) -> list[int]:
    """Without offsets only the borders of turns are known: what lies between them is one segment."""
    at, known = [], 0
    for start, *_ in runs:
        known = borders.get(start) or known
        at.append(known)
    return at


def _outside_and_inside(draft: Draft, messages: Sequence[Mapping[str, Any]]) -> list[Run]:
    runs: list[Run] = []
    done = 0
    for turn in draft.turns:
        runs += _outside(draft, done, turn.start, messages)
        runs += _inside(draft, turn)
        done = turn.stop
    return runs + _outside(draft, done, len(draft.text), messages)


def _pieces(draft: Draft, start: int, stop: int) -> list[tuple[int, int, Source | None]]:
    """(start, stop, source) of the runs in text[start:stop]; source None for the template's own."""
    if draft.traced is None:
        return [(start, stop, None)] if stop > start else []
    pieces, at = [], 0
    for end, source in draft.traced.text.runs:
        a, b = max(at, start), min(end, stop)
        if a < b:
            pieces.append((a, b, draft.traced.sources[source] if source else None))
        at = end
    if at < stop:  # a header that was appended
        pieces.append((max(at, start), stop, None))
    return pieces


_KIND_OF_ROLE = {"assistant": "answer", "function": "tool", "ipython": "tool"}


def _kind(source: Source, messages: Sequence[Mapping[str, Any]]) -> str:
    if source.message is None:
        return "system"
    if source.field == "role" or source.message >= len(messages):
        return "template"
    role = str(messages[source.message].get("role"))
    if role == "assistant":
        return (
            "reasoning"
            if source.field in REASONING_FIELDS
            else "tool_call"
            if source.field == "tool_calls"
            else "answer"
        )
    return _KIND_OF_ROLE.get(role, role)


def _outside(draft: Draft, start: int, stop: int, messages: Sequence[Mapping[str, Any]]) -> list[Run]:
    return [
        (a, b, _kind(s, messages) if s else "template", False, s.message if s and s.field != "role" else None)
        for a, b, s in _pieces(draft, start, stop)
    ]


def _inside(draft: Draft, turn: Turn) -> list[Run]:
    """The output's runs: each field, and the text around it with the field that it marks up."""
    marked = [
        (a, b, s.field or "")
        for a, b, s in _pieces(draft, turn.start, turn.end)
        if s is not None and s.message == turn.message
    ]
    runs: list[Run] = []
    at, before = turn.start, ""
    for a, b, name in marked:
        kind = "reasoning" if name in REASONING_FIELDS else "tool_call" if name == "tool_calls" else "answer"
        glue = before if before == "reasoning" else kind
        if at < a:
            runs.append((at, a, glue, True, turn.message))
        runs.append((a, b, kind, True, turn.message))
        at, before = b, kind
    if at < turn.end:
        runs.append((at, turn.end, before or "answer", True, turn.message))
    return [*runs, (turn.end, turn.stop, "end_of_turn", True, turn.message)]
