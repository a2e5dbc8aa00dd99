"""The audit of a prepared set of any size: rows are encoded onto disk, prepared rows read in parts, findings added up.

Each document of a prepared row is looked up by a hash of all of it; what isn't found so (cut, packed without positions,
another text) is compared with the few examples that share rare runs of tokens with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np

from ..encoded import EncodedRows
from ..encoder.encode import Encoder
from ..rows.data import Row
from ..sequence import Example, Rejected
from .alignment import Library, blocks, fill
from .evidence import Evidence, ObservedRow, mark_padding
from .limits import Limits
from .modes import in_modes, modes_of, numbered, refused_rows
from .prepared import Prepared
from .repeats import Repeats
from .rules.shared import STRAY
from .store import Found, SequenceStore
from .structure import Structure
from .tally import HitCounts

CHUNK = 512  # rows in memory at a time
OF_ALL_ROWS = (
    "length-outliers",
)  # needs all of them in memory: `ygx audit ROWS` without labels looks at that
OF_GIVEN_ROWS = ("rows-unrecognised", "rows-missing")


@dataclass
class PreparedAudit:
    """What an audit of a prepared set needs, and what it has come to."""

    prepared: Prepared
    tokenizer: Any
    limits: Limits
    tally: HitCounts = field(default_factory=HitCounts)
    shown: list[ObservedRow] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=lambda: Repeats("prepared rows"))

    def without_rows(self) -> None:
        """Audit what the ids alone say, by the headers that the template writes."""
        structure = Structure(self.tokenizer, self.limits.stop_ids)
        for chunk in self._chunks():
            known = sum(structure.mark(seen) for seen in chunk)
            self._judge(chunk, OF_GIVEN_ROWS)
            self._count({"recognised": known})
        self._finish(Evidence())

    def with_rows(self, rows: Iterable[Any], encoder: Encoder) -> None:
        """Audit against what the encoder says of the rows; rows is read twice where a template has modes."""
        with ExitStack() as opened:
            store, further = (opened.enter_context(SequenceStore()) for _ in range(2))
            for part in _parts(numbered(rows)):
                self._encode(part, encoder, store)
            store.freeze()
            modes = modes_of(encoder)
            matcher = Matcher(store)
            waiting = self._first_pass(matcher, wait=bool(modes))
            if waiting:
                needed = {n for candidates in waiting.values() for n in candidates}
                by_row = {store.indices[n]: n for n in needed}
                for row in numbered(rows):
                    if isinstance(row, Row) and row.index in by_row:
                        matcher.add_modes(by_row[row.index], list(in_modes(row, modes)), further)
                further.freeze()
                self._second_pass(matcher, waiting)
            missing = [store.indices[n] for n in range(len(store)) if not matcher.found[n]]
            empty = () if self.counts.get("rows") else ("the rows",)
            self._finish(Evidence(unmatched=missing, read=len(store), empty=empty))

    def _finish(self, ev: Evidence) -> None:
        """What can be said once everything has been seen."""
        ev.tokenizer, ev.repeats = self.tokenizer, self.repeats
        if not self.counts.get("prepared rows"):
            ev.empty = (*ev.empty, "the prepared set")
        self.tally.add(ev, only=("rows-missing", "duplicates", "conflicting-answers", "nothing-read"))

    def _encode(self, part: list[Row | Rejected], encoder: Encoder, store: SequenceStore) -> None:
        unread = [r for r in part if isinstance(r, Rejected)]
        examples, rejected = encoder.batch(r for r in part if isinstance(r, Row))
        ev = self._evidence(encoded=EncodedRows.of(examples), rejected=[*unread, *rejected])
        self.tally.add(ev, leave_out=(*OF_ALL_ROWS, "doubled-bos"))
        counts = {"rows": len(part), "accepted": len(examples), "quarantined": len(ev.rejected)}
        self._count(counts)
        for example in [
            *examples,
            *refused_rows(part, {e.index for e in examples if e.index is not None}, encoder),
        ]:
            store.add(example)

    def _first_pass(self, matcher: Matcher, *, wait: bool) -> dict[int, list[int]]:
        """Judge the rows that are known sequences; others, too, unless they are to wait for other modes.

        Returns the numbers of waiting rows with the examples that each may hold.
        """
        waiting: dict[int, list[int]] = {}
        for chunk in self._chunks():
            slow: dict[int, list[int]] = {}
            for seen in chunk:
                placed = matcher.place(seen)
                if placed is None:
                    slow[seen.row] = matcher.candidates(seen)
                elif wait and not placed.exact:
                    slow[seen.row] = [found.number for found, _, _ in placed.parts]
                else:
                    matcher.fill(seen, placed)
            if wait:
                late = {row for row, candidates in slow.items() if candidates}
                waiting |= {row: slow[row] for row in late}
                chunk = [s for s in chunk if s.row not in late]
            else:
                matcher.align([s for s in chunk if s.row in slow], slow)
            self._judge(chunk)
        return waiting

    def _second_pass(self, matcher: Matcher, waiting: Mapping[int, list[int]]) -> None:
        """Judge the rows that waited, against all modes."""
        rows = (s for s in self.prepared if isinstance(s, ObservedRow) and s.row in waiting)
        for chunk in _parts(rows):
            slow = []
            for seen in chunk:
                placed = matcher.place(seen)
                if placed is not None and placed.exact:
                    matcher.fill(seen, placed)
                else:
                    slow.append(seen)
            matcher.align(slow, waiting)
            self._judge(chunk)

    def _chunks(self) -> Iterator[list[ObservedRow]]:
        for part in _parts(self.prepared):
            broken = [r for r in part if isinstance(r, Rejected)]
            if broken:
                self.tally.add(self._evidence(rejected=broken), only=("rows-quarantined",))
            self._count({"prepared rows": len(part), "unreadable": len(broken)})
            yield [s for s in part if isinstance(s, ObservedRow)]

    def _judge(self, chunk: list[ObservedRow], leave_out: tuple[str, ...] = ("rows-missing",)) -> None:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        for seen in chunk:
            mark_padding(seen, pad)
        self.tally.add(self._evidence(labels=chunk), leave_out=leave_out)
        for seen in chunk:
            spans = [(p.start, p.stop) for p in seen.pieces] or documents_in(seen)
            for start, stop in spans:
                self.repeats.add(seen.row, seen.ids[start:stop], seen.output[start:stop])
        trained = sum(int(s.trained.sum()) for s in chunk)
        tokens = sum(int(s.attended.sum()) for s in chunk)
        known = sum(bool(s.pieces) for s in chunk)
        self._count({"tokens": tokens, "trained": trained, "recognised": known})
        self.shown += chunk[: max(0, SHOWN - len(self.shown))]

    def _evidence(self, **given: Any) -> Evidence:
        length, stops = self.limits
        return Evidence(tokenizer=self.tokenizer, context_length=length, stop_ids=stops, **given)

    def _count(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count


SHOWN = 200  # rows token by token on the page


@dataclass
class Placed:
    """(sequence, start, stop) of each document of a row; exact: whether none is more than cut at its end."""

    parts: list[tuple[Found, int, int]]
    exact: bool


class Matcher:
    """Finds the sequences of a store in prepared rows. found: for each example, whether a row holds it."""

    def __init__(self, store: SequenceStore) -> None:
        self.store, self.found = store, bytearray(len(store))
        self._modes: dict[int, tuple[SequenceStore, int]] = {}
        self._further: SequenceStore | None = None

    def add_modes(self, number: int, examples: list[Example], further: SequenceStore) -> None:
        """Other renderings of an example, kept in a store of their own."""
        if examples:
            self._modes[number] = (further, len(further))
            sequences = tuple(s for e in examples for s in e.sequences)
            further.add(replace(examples[0], sequences=sequences, index=number))
            self._further = further

    def place(self, seen: ObservedRow) -> Placed | None:
        """Which sequence each document of a row is; None where one isn't found by all of it or by an end.

        A few tokens before or behind a document may be nobody's.
        """
        placed = Placed([], True)
        for start, stop in documents_in(seen):
            whole = self._equal(seen, start, stop)
            if whole is not None:
                placed.parts.append((whole, start, stop))
                continue
            inner = [start + i for i in self.store.beginnings(seen.ids[start:stop]) if i]
            for a, b in pairwise((start, *inner, stop)):
                part = self._equal(seen, a, b) or self._by_an_end(seen.ids[a:b])
                if part is not None:
                    placed.parts.append((part, a, b))
                elif b - a > STRAY:
                    return None
                placed.exact &= part is not None and np.array_equal(part.sequence.ids[: b - a], seen.ids[a:b])
        return placed if placed.parts else None

    def fill(self, seen: ObservedRow, placed: Placed) -> None:
        """Write what is known of its documents into a row."""
        for found, start, stop in placed.parts:
            common = blocks(seen.ids[start:stop], found.sequence.ids)
            fill(seen, found.example, found.place, start, stop, common)
            self.found[found.number] = 1

    def _equal(self, seen: ObservedRow, start: int, stop: int) -> Found | None:
        """The sequence that a document is; of several, one that trains what it trains and wasn't found yet."""
        ids, trained = seen.ids[start:stop], seen.trained[start:stop]
        equal = self.store.equal(ids)
        if not equal and self._further is not None:
            equal = [f._replace(number=self._further.indices[f.number]) for f in self._further.equal(ids)]

        def fit(f: Found) -> tuple[int, bool]:
            return int(((f.sequence.weights > 0) == trained).sum()), not self.found[f.number]

        return max(equal, key=fit, default=None)

    def _by_an_end(self, ids: np.ndarray) -> Found | None:
        """The sequence whose beginning or end, over at least half of these ids, is theirs too."""
        found = [f for n in self.store.with_its_edge(ids) for f in self.store.sequences(n)]
        return max(found, key=lambda f: (common_ends(ids, f.sequence.ids), -len(f.sequence)), default=None)

    def candidates(self, seen: ObservedRow) -> list[int]:
        """Examples that a row may hold."""
        return self.store.similar(seen.ids[seen.attended])

    def align(self, rows: list[ObservedRow], candidates: Mapping[int, list[int]]) -> None:
        """Fill in rows that are no sequence exactly. candidates: by row."""
        numbers = sorted({n for s in rows for n in candidates[s.row]})
        if not numbers:
            return
        examples = [self._example(n) for n in numbers]
        library = Library(examples, rows)
        of = {s.ids.tobytes(): n for n, e in zip(numbers, examples, strict=True) for s in e.sequences}
        for seen in rows:
            library.align(seen)
            for piece in seen.pieces:
                self.found[of[piece.sequence.ids.tobytes()]] = 1

    def _example(self, number: int) -> Example:
        example = self.store.example(number)
        if number in self._modes:
            store, at = self._modes[number]
            example = replace(example, sequences=(*example.sequences, *store.example(at).sequences))
        return example


def common_ends(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that two lists begin and end with alike."""
    size = min(len(a), len(b))
    head = np.append(a[:size] == b[:size], False).argmin()
    tail = np.append((a[len(a) - size :] == b[len(b) - size :])[::-1], False).argmin()
    return int(head + tail)


def documents_in(seen: ObservedRow) -> list[tuple[int, int]]:
    """[start, stop) of each document of a row by its positions; padding is in none."""
    key = np.where(seen.attended, seen.documents, -1)
    edges = np.flatnonzero(np.diff(key, prepend=-2, append=-2))
    return [(int(a), int(b)) for a, b in pairwise(edges) if key[a] >= 0]


def _parts(rows: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while part := list(islice(iterator, CHUNK)):
        yield part
