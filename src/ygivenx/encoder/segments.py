"""From characters to tokens: of which kind each token of a candidate is.

Characters with weights of their own (spans) give a token the least of theirs: one that holds the border of a span is
trained no more than either side allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RowError
from ..rows.nouns import Conversation
from ..sequence import Segment
from ..templating.inputs import REASONING_FIELDS
from ..templating.origins import Source
from .policy import Options
from .render import KIND_OF_ROLE, Borders, Outline, Rendering, Run, Tags, Turn
from .tokenize import Encoded

_LONGEST_TAG = 256  # characters, with white space behind it
Messages = Sequence[Mapping[str, Any]]
Piece = tuple[int, int, Source | None]  # characters [start, stop), source: None for the template's own


def outline_of(rendering: Rendering, row: Conversation, cuts: tuple[int, ...] = ()) -> Outline:
    """The outline of a text that is cut at `cuts`, where its row writes control tokens, and where its turns are."""
    turns = tuple((t.message, t.start, t.end, t.stop) for t in rendering.turns)
    notes = rendering.notes + tuple(n for t in rendering.turns for n in t.notes)
    notes += (_AS_TEXT,) if cuts else ()
    cuts = tuple(sorted({*cuts, *(t.cut for t in rendering.turns if t.cut is not None)}))
    runs = tuple(_merged(_runs(rendering, row.messages)))
    outline = Outline(rendering.text, turns, runs, notes, cuts=cuts)
    return left_open(outline, rendering, len(row.messages) - 1) if row.continue_final_message else outline


_AS_TEXT = "control tokens in the row's text are encoded as text: the ids differ from the template's"


def only(outline: Outline, kept: tuple[Borders, ...], stop: int, *notes: str) -> Outline:
    """The outline up to character `stop`, with the outputs of these turns alone; those of others are context."""
    mine = {turn[0] for turn in kept}
    runs = tuple(r if r[3] in mine or not r[2] else _as_context(r) for r in outline.runs if r[0] < stop)
    cuts = tuple(c for c in outline.cuts if c < stop)
    notes = (*outline.notes, *notes)
    return replace(outline, text=outline.text[:stop], turns=kept, runs=runs, notes=notes, cuts=cuts)


def _as_context(run: Run) -> Run:
    at, kind, _, message = run
    return (at, "template", False, None) if kind == "end_of_turn" else (at, kind, False, message)


def with_thoughts(outline: Outline, tags: Tags, masked: bool = False) -> Outline:
    """The outline with the thought that a reply's content begins with, marks and all, as reasoning.

    masked: an empty thought is context instead, as if its prompt had it.
    """
    thoughts = [(turn, _after_thought(outline.text, turn, tags)) for turn in outline.turns]
    runs = outline.runs
    for turn, stop in thoughts:
        mine = [r for r in runs if r[2] and r[3] == turn[0]] if stop is not None else []
        if stop is None or any(kind == "reasoning" for _, kind, _, _ in mine):
            continue
        is_empty = masked and not tags.marks.sub("", outline.text[turn[1] : stop]).strip()
        kind, output = ("template", False) if is_empty else ("reasoning", True)
        # The run in which the thought ends goes on behind it; those before it are the thought.
        there = next(r for r in reversed(mine) if r[0] <= stop)
        thought = [(at, kind, output, i if output else None) for at, _, _, i in mine[:1]]
        rest = [(stop, *there[1:]), *(r for r in mine if r[0] > stop)]
        runs = tuple(sorted([r for r in runs if r not in mine] + thought + rest, key=lambda r: r[0]))
    return outline if runs is outline.runs else replace(outline, runs=runs)


def _after_thought(text: str, turn: Borders, tags: Tags) -> int | None:
    """Where the answer begins after the thought of a turn that begins with one, or goes on with one of its prompt's."""
    _, start, end, _ = turn
    opened = tags.opens(text[max(0, start - _LONGEST_TAG) : start])
    found = (tags.rest_of_thought if opened else tags.thought).match(text, start, end)
    return found and found.end()


def segments_of(outline: Outline, encoded: Encoded, borders: Mapping[int, int]) -> list[Segment]:
    """Segments over all tokens. `borders`: index of the token at each turn's start, end and stop, and at others.

    A token belongs to the run of its first character; the borders of outputs are exact.
    """
    runs = outline.runs
    if encoded.tiled:
        # The first token that begins at the run's first character or behind it.
        at = encoded.starts.searchsorted(np.array([r[0] for r in runs])).tolist()
    else:
        at = _by_borders(runs, borders)
    at = [borders.get(run[0], i) for run, i in zip(runs, at, strict=True)]
    ends = pairwise([*at, len(encoded.ids)])
    return [
        Segment(first, last, *run[1:]) for (first, last), run in zip(ends, runs, strict=True) if first < last
    ]


def _by_borders(runs: Sequence[Run], borders: Mapping[int, int]) -> list[int]:
    """Without offsets only these borders are known: what lies between them is one segment."""
    at, known = [], 0
    for run in runs:
        known = borders.get(run[0], known)
        at.append(known)
    return at


def _merged(runs: list[Run]) -> list[Run]:
    return runs[:1] + [b for a, b in pairwise(runs) if a[1:] != b[1:]]


def _runs(rendering: Rendering, messages: Messages) -> list[Run]:
    pieces = _pieces(rendering)
    runs: list[Run] = []
    done = 0
    for turn in rendering.turns:
        runs += _outside(_between(pieces, done, turn.start), messages)
        runs += _inside(rendering.text, turn, _between(pieces, turn.start, turn.end))
        done = turn.stop
    return runs + _outside(_between(pieces, done, len(rendering.text)), messages)


def _pieces(rendering: Rendering) -> list[Piece]:
    """The whole text by source; one piece where origins aren't known."""
    pieces: list[Piece] = []
    at = 0
    if rendering.traced is not None:
        for stop, s in rendering.traced.text.runs:
            pieces.append((at, stop, rendering.traced.sources[s] if s else None))
            at = stop
    if at < len(rendering.text):  # unknown, or a header that was appended
        pieces.append((at, len(rendering.text), None))
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
    kind = _field_kind(source.field) if role == "assistant" else KIND_OF_ROLE.get(role, role)
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
        # The template's own tags between two fields are output, too: what closes a thought belongs to it, and what
        # opens a call to the call.
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
    return [*runs, (turn.end, "end_of_turn", True, turn.message)] if turn.end < turn.stop else runs


# === spans ===============================================================================================


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
            # The least of its characters' weights: a token that straddles is trained no more than either side allows.
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


def left_open(outline: Outline, rendering: Rendering, last: int) -> Outline:
    """The outline up to where the last message ends, if that is a reply in it: what closes it isn't written."""
    turns = [t for t in outline.turns if t[0] == last]
    if not turns:
        return outline
    message, start, end, _ = turns[0]
    traced = next((t.traced for t in rendering.turns if t.message == last), None) or rendering.traced
    if traced:  # behind the last words a template may write more than the token that ends the turn
        end = max((stop for _, stop in traced.spoken[last] if start <= stop <= end), default=end)
    kept = (*(t for t in outline.turns if t[0] != last), (message, start, end, end))
    note = f"messages[{last}] is left open: the end of its turn isn't trained"
    return replace(only(outline, kept, end, note), control=[c for c in outline.control if c[1] <= end])


# === border='split' ======================================================================================


def encoded_apart(
    texts: Iterable[tuple[Outline, Encoded]], options: Options
) -> Iterator[tuple[Outline, Encoded]]:
    """With border="split", a turn whose first token would hold the end of x has a sequence of its own, in which x
    and y are encoded apart; for what follows it is history, as inference would encode it."""
    tokens = options.tokens
    for outline, encoded in texts:
        torn = [t for t in outline.turns if tokens.border(encoded, t[1], outline.cuts) is None]
        if not torn:
            yield outline, encoded
            continue
        tokens.need_plain_joints("border='split'")
        if whole := tuple(t for t in outline.turns if t not in torn):
            yield only(outline, whole, len(outline.text)), encoded
        for turn in torn:
            message, start, _, stop = turn
            own = only(outline, (turn,), stop, f"messages[{message}]: {_SPLIT}")
            own = replace(own, cuts=tuple(sorted({start, *own.cuts})))
            yield own, tokens.encode_cut([(own.text, own.cuts)])[0]


_SPLIT = "x and y are encoded apart, as inference would: the ids differ from the template's"
