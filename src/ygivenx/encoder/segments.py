"""From characters to tokens: which segment each token of a rendered conversation belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..sequence import Segment
from ..templating.inputs import REASONING_FIELDS
from ..templating.origins import Source
from .tokens import Encoded

if TYPE_CHECKING:
    from .candidates import Rendering, Turn
    from .thoughts import Tags

Messages = Sequence[Mapping[str, Any]]
Piece = tuple[int, int, Source | None]  # characters [start, stop), source: None for the template's own
Run = tuple[int, str, bool, int | None]  # its first character, kind, output, message
Borders = tuple[
    int, int, int, int
]  # a turn's message; its output is [start, stop), its end token [end, stop)
Spans = Sequence[tuple[int, int]]

KIND_OF_ROLE = {"assistant": "answer", "function": "tool", "ipython": "tool"}


@dataclass(frozen=True, slots=True)
class Outline:
    """A text to be encoded: where its runs begin, and the borders of its turns.

    control: where control tokens must stand in the text, if that isn't known otherwise.
    cuts: the characters at which it is cut, its parts encoded apart.
    """

    text: str
    turns: tuple[Borders, ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    control: Spans = ()
    cuts: tuple[int, ...] = ()

    @property
    def places(self) -> Iterator[int]:
        """Every character that the outline speaks of."""
        for turn in self.turns:
            yield from turn[1:]
        for run in self.runs:
            yield run[0]
        for span in self.control:
            yield from span

    def only(self, kept: tuple[Borders, ...], stop: int, *notes: str) -> Outline:
        """The same up to character `stop`, with the outputs of these turns alone; those of others are context."""
        mine = {turn[0] for turn in kept}
        runs = [r if r[3] in mine or not r[2] else _as_context(r) for r in self.runs if r[0] < stop]
        notes = (*self.notes, *notes)
        cuts = tuple(c for c in self.cuts if c < stop)
        return replace(self, text=self.text[:stop], turns=kept, runs=tuple(runs), notes=notes, cuts=cuts)

    def moved(self, text: str, to: Mapping[int, int]) -> Outline:
        """The same of another text, in which each of its places stands elsewhere."""
        turns = tuple([(i, to[a], to[b], to[c]) for i, a, b, c in self.turns])
        runs = tuple([(to[at], kind, output, i) for at, kind, output, i in self.runs])
        return replace(
            self, text=text, turns=turns, runs=runs, control=[(to[a], to[b]) for a, b in self.control]
        )


def _as_context(run: Run) -> Run:
    at, kind, _, message = run
    return (at, "template", False, None) if kind == "end_of_turn" else (at, kind, False, message)


def outline_of(rendering: Rendering, messages: Messages, cuts: tuple[int, ...] = ()) -> Outline:
    """The outline of a text that is cut at `cuts`, and before each reply that is encoded apart."""
    turns = tuple((t.message, t.start, t.end, t.stop) for t in rendering.turns)
    notes = rendering.notes + tuple(n for t in rendering.turns for n in t.notes)
    cuts = tuple(sorted({*cuts, *(t.start for t in rendering.turns if t.is_apart)}))
    return Outline(rendering.text, turns, tuple(_merged(_runs(rendering, messages))), notes, cuts=cuts)


def with_thoughts(outline: Outline, tags: Tags, masked: bool = False) -> Outline:
    """The outline with the thought that a reply's content begins with, marks and all, as reasoning.

    masked: an empty thought is context instead, as if its prompt had it.
    """
    if not tags.marks.search(outline.text):
        return outline
    runs = list(outline.runs)
    for turn in outline.turns:
        stop = _after_thought(outline.text, turn, tags)
        mine = [r for r in runs if r[2] and r[3] == turn[0]]
        if stop is None or any(kind == "reasoning" for _, kind, _, _ in mine):
            continue
        is_empty = masked and not tags.marks.sub("", outline.text[turn[1] : stop]).strip()
        kind, output = ("template", False) if is_empty else ("reasoning", True)
        there = next(r for r in reversed(mine) if r[0] <= stop)
        thought = [(at, kind, output, i if output else None) for at, _, _, i in mine[:1]]
        rest = [(stop, *there[1:]), *(r for r in mine if r[0] > stop)]
        runs = sorted([r for r in runs if r not in mine] + thought + rest, key=lambda r: r[0])
    return replace(outline, runs=tuple(runs))


def _after_thought(text: str, turn: Borders, tags: Tags) -> int | None:
    """Where the answer begins after the thought of a turn that begins with one, or goes on with one of its prompt's."""
    _, start, end, _ = turn
    found = (tags.rest_of_thought if tags.opened.search(text[:start]) else tags.thought).match(
        text, start, end
    )
    return found and found.end()


def segments_of(outline: Outline, encoded: Encoded, borders: Mapping[int, int]) -> list[Segment]:
    """Segments over all tokens. `borders`: index of the token at each turn's start, end and stop, and at others.

    A token belongs to the run of its first character; the borders of outputs are exact.
    """
    runs = outline.runs
    if encoded.tiled:
        at = np.searchsorted(encoded.starts, np.array([r[0] for r in runs])).tolist()
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
