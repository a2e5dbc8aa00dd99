"""Candidates for speed: what was proven of one conversation, used for others of its shape.

Two conversations have one shape if they have the same roles, fields and weights in the same order and differ in
nothing but the texts of contents and reasoning. The candidates are made once with a placeholder for each text; they
are those of every row of the shape whose texts answer the template's questions alike and write no control token. Such
a row costs its questions and a join, in place of some renderings for each of its turns. `Proofs.candidates` is the one
entry, and gives what its slow twin does, `prove.candidates`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

from ..errors import RowError
from ..templating.inputs import REASONING_FIELDS, ROLES
from ..templating.placeholders import FIRST, MARK, PathConditions, Undecided
from ..templating.symbolic import SymbolicTemplate
from .content import misspoken
from .prove import candidate, candidates
from .render import Candidate, Chat, Outline
from .repairs import last_resorts, strategies
from .tokenize import Tokens, ids_fault

_TEXTS = frozenset({"content", *REASONING_FIELDS})
_FIELDS = _TEXTS | {"role"}
_MOST_SHAPES, _MOST_TRIES = 4096, 8

Shape = tuple[Any, ...]
Candidates = Iterator["Candidate | RowError"]


@dataclass(frozen=True)
class Form:
    """An outline around placeholders: its words, the placeholders between them, and where its places stand."""

    outline: Outline
    words: tuple[str, ...]
    placeholders: tuple[int, ...]
    after: dict[int, int]  # of each place in the outline: how many placeholders stand before it

    @classmethod
    def of(cls, outline: Outline) -> Form:
        """The form of an outline whose text has marks."""
        marks = [m.start() for m in MARK.finditer(outline.text)]
        placeholders = tuple(ord(outline.text[at]) - FIRST for at in marks)
        places = {p: bisect_left(marks, p) for p in outline.places}
        return cls(outline, tuple(MARK.split(outline.text)), placeholders, places)

    def filled(self, texts: Sequence[str]) -> Outline:
        """The outline with a text in the place of each placeholder."""
        parts = [self.words[0]]
        for placeholder, words in zip(self.placeholders, self.words[1:], strict=True):
            parts += (texts[placeholder], words)
        # A mark is one character: a place moves by what the texts before it are longer than that.
        grown = [0, *accumulate(len(texts[h]) - 1 for h in self.placeholders)]
        return self.outline.moved("".join(parts), {p: p + grown[n] for p, n in self.after.items()})


@dataclass(frozen=True)
class Proof:
    """The candidates of a shape over placeholders, in order, and the conditions under which they are those of a row."""

    conditions: PathConditions
    candidates: tuple[tuple[tuple[Form, ...], tuple[str, ...]], ...]

    def filled(self, given: Sequence[str], tokens: Tokens) -> list[Candidate] | None:
        """The candidates with these texts; None if they would answer otherwise, or write control tokens."""
        texts = self.conditions.texts(given)
        if not self.conditions.hold_for(texts):
            return None
        filled_in = [
            Candidate(tuple(f.filled(texts) for f in forms), notes) for forms, notes in self.candidates
        ]
        return filled_in if all(_forges_nothing(o, tokens) for c in filled_in for o in c.outlines) else None


def _forges_nothing(outline: Outline, tokens: Tokens) -> bool:
    """Whether control tokens stand where they stood over placeholders, and nowhere else.

    A template may write one half of a token and a row the other: neither has it alone.
    """
    return outline.control == [m.span() for m in tokens.control(outline.text)]


@dataclass
class Proofs:
    """The proofs by template and shape; a proof is made at the second row that needs it."""

    by_shape: dict[Shape, list[Proof]] = field(default_factory=dict)
    tries: dict[Shape, int] = field(default_factory=dict)

    def candidates(self, chat: Chat) -> Candidates:
        """The row's candidates: by a proof for its shape, and then by itself."""

        found = _shape(chat)
        if found is not None and not any(map(chat.options.tokens.has_control, found[1])):
            known = self._known(chat, *found)
            if known is not None:
                yield from known
        yield from candidates(chat)

    def _known(self, chat: Chat, shape: Shape, texts: list[str]) -> list[Candidate] | None:
        tokens = chat.options.tokens
        for proof in self.by_shape.get(shape, ()):
            if (filled_in := proof.filled(texts, tokens)) is not None:
                return _saying(chat, filled_in)
        if shape not in self.tries and len(self.tries) >= _MOST_SHAPES:
            return None
        tries = self.tries[shape] = self.tries.get(shape, 0) + 1
        # A proof costs several rows' work: none is made for a shape that occurs once, and few for one whose texts
        # answer differently each time.
        if not 1 < tries <= 1 + _MOST_TRIES:
            return None
        try:
            learnt = _proof(chat, texts)
        except (RowError, Undecided):
            return None
        if learnt is None:
            return None
        self.by_shape.setdefault(shape, []).append(learnt)
        return _saying(chat, learnt.filled(texts, tokens))


def _saying(chat: Chat, found: list[Candidate] | None) -> list[Candidate] | None:
    """The candidates; None where a reply is written otherwise than its row has it."""
    turns = ((o.text, *turn) for c in found or () for o in c.outlines for turn in o.turns)
    messages = chat.inputs.messages
    wrong = any(any(misspoken(text[a:b], messages[i], chat.tags)) for text, i, a, b, _ in turns)
    return None if wrong else found


def _proof(chat: Chat, texts: list[str]) -> Proof | None:
    """The candidates up to the first whose ids fit for this row; None where a strategy before it needs the texts."""

    template = SymbolicTemplate(chat.template, chat.inputs)
    symbolic = replace(chat, inputs=template.inputs)
    proven: list[tuple[tuple[Form, ...], tuple[str, ...]]] = []
    for strategy in chain(strategies(symbolic), last_resorts(symbolic)):
        if not strategy.is_symbolic:
            return None
        found = candidate(symbolic, strategy, template)
        if isinstance(found, RowError):
            continue
        control = chat.options.tokens.control
        outlines = [replace(o, control=[m.span() for m in control(o.text)]) for o in found.outlines]
        proven.append((tuple(map(Form.of, outlines)), found.notes))
        filled_in = Proof(template.conditions, tuple(proven)).filled(texts, chat.options.tokens)
        if filled_in is None:
            return None
        if ids_fault(filled_in[-1], chat.options) is None:
            return Proof(template.conditions, tuple(proven))
    return None


def _shape(chat: Chat) -> tuple[Shape, list[str]] | None:
    """The shape and its texts; None for a row that has more than texts, or a text of white space alone."""
    row, inputs = chat.row, chat.inputs
    if inputs.tools or inputs.documents or row.template_kwargs:
        return None
    shape: list[Any] = [chat.template.source, row.continue_final_message]
    texts: list[str] = []
    for given, m in zip(row.messages, inputs.messages, strict=True):
        content, thoughts = "", dict[str, None]()
        # A weight of 1 that the row itself gives isn't the same as none: see `prove._asked_for`.
        entry: list[Any] = [given.get("weight")]
        for name, text in m.items():
            if not isinstance(text, str) or name not in _FIELDS or text.isspace():
                return None
            if name == "role":
                entry.append(text)
                continue
            entry += (name, bool(text))
            if name == "content":
                content = text
            else:
                thoughts[text] = None
        if m["role"] not in ROLES or len(thoughts) > 1:
            return None
        shape.append(tuple(entry))
        texts += [text for text in (content, *thoughts) if text]
    return tuple(shape), texts
