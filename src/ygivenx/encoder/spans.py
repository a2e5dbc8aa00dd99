"""Weights of single characters within a message's content, and replies that are left open.

A token has the least weight of its characters: one that holds the border of a span is trained no more than either
side allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RowError
from ..sequence import Segment
from .segments import Outline
from .tokens import Encoded

_STRADDLES = "a token that holds the border of a span has the smaller weight of both sides"


def apply_spans(
    weights: npt.NDArray[np.float32],
    segments: Iterable[Segment],
    encoded: Encoded,
    messages: tuple[Mapping[str, Any], ...],
) -> tuple[str, ...]:
    """Multiply the weights of tokens by those of the spans that they stand in; notes of what a reader has to know."""
    notes: list[str] = []
    for i in {s.message for s in segments if s.message is not None and "spans" in messages[s.message]}:
        mine = [s for s in segments if s.message == i and s.kind != "end_of_turn"]
        first, last = min(s.start for s in mine), max(s.stop for s in mine)
        if not weights[first:last].any():
            continue
        if not encoded.tiled:
            raise _unplaced(i, "this tokenizer doesn't say where its tokens stand in the text")
        starts, stops = encoded.starts[first:last], encoded.stops[first:last]
        factors = _character_weights(encoded.text, int(starts[0]), int(stops[-1]), messages[i], i)
        for k, (a, b) in enumerate(zip(starts - starts[0], stops - starts[0], strict=True), first):
            within = factors[a:b]
            weights[k] *= within.min(initial=1.0) if len(within) else 1.0
            if len(within) and within.min() != within.max() and _STRADDLES not in notes:
                notes.append(_STRADDLES)
    return tuple(notes)


def _character_weights(
    text: str, start: int, stop: int, message: Mapping[str, Any], number: int
) -> npt.NDArray[np.float32]:
    """float32 of the characters [start, stop) of a text that writes a message: 1 outside its content."""
    content = str(message["content"])
    written = content.strip()  # many templates trim
    if not written or text.count(written, start, stop) != 1:
        raise _unplaced(number, "the template doesn't write its content once, as it stands")
    offset = text.index(written, start, stop) - start - (len(content) - len(content.lstrip()))
    weights = np.ones(stop - start, np.float32)
    weights[max(offset, 0) : offset + len(content)] = 0
    for span in message["spans"]:
        weights[max(offset + span["start"], 0) : max(offset + span["stop"], 0)] = span["weight"]
    return weights


def _unplaced(number: int, why: str) -> RowError:
    what = "the characters that its spans name can't be found among the tokens"
    fix = "give the whole message a weight, or mend the content so that the template writes it unchanged"
    return RowError(what, reason="spans_unplaced", field=f"messages[{number}].spans", why=why, fix=fix)


def left_open(outline: Outline, last: int) -> Outline:
    """The outline up to where the last message ends, if that is a reply in it: what closes it isn't written."""
    turns = [t for t in outline.turns if t[0] == last]
    if not turns:
        return outline
    message, start, end, _ = turns[0]
    kept = (*(t for t in outline.turns if t[0] != last), (message, start, end, end))
    note = f"messages[{last}] is left open: the end of its turn isn't trained"
    return replace(outline.only(kept, end, note), control=[c for c in outline.control if c[1] <= end])
