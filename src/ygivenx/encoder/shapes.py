"""What was proven of one conversation, used for others of its shape.

Two conversations have one shape if they have the same roles, fields and weights in the same order and differ in
nothing but the texts of contents and reasoning. The proof is made once with a hole for each text (holes.py); it holds
for every row of the shape whose texts answer the template's questions alike and write no control token. Such a row
costs its questions and a join, in place of some renderings for each of its turns. Any other row is proven by itself:
that way is the slow twin of this one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from ..errors import RowError
from ..rows.formats import Conversation
from .asking import AskingEnvironment
from .holes import FIRST, MARK, Hole, Sheet, Undecided, marked_text
from .inputs import REASONING_FIELDS, ROLES, Inputs
from .layout import Outline
from .origins import TEMPLATE, Source, text_with
from .renderings import Row, common_prefix
from .sandbox import environment
from .template import Template
from .tokens import Tokens
from .tracing import Marked, Traced

_TEXTS = frozenset({"content", *REASONING_FIELDS})
_FIELDS = _TEXTS | {"role"}
_MOST_SHAPES, _MOST_TRIES = 4096, 8

Shape = tuple[Any, ...]
Prove = Callable[[Row], list[Outline]]


@dataclass(frozen=True)
class Form:
    """An outline around holes: its words, the holes between them, and where its places stand among them."""

    outline: Outline
    words: tuple[str, ...]
    holes: tuple[int, ...]
    after: dict[int, int]  # of each place in the outline: how many holes stand before it

    @classmethod
    def of(cls, outline: Outline) -> Form:
        marks = [m.start() for m in MARK.finditer(outline.text)]
        holes = tuple(ord(outline.text[at]) - FIRST for at in marks)
        places = {p: bisect_left(marks, p) for p in outline.places}
        return cls(outline, tuple(MARK.split(outline.text)), holes, places)

    def filled(self, texts: Sequence[str]) -> Outline:
        parts = [self.words[0]]
        for hole, words in zip(self.holes, self.words[1:], strict=True):
            parts += (texts[hole], words)
        grown = [0, *accumulate(len(texts[h]) - 1 for h in self.holes)]
        return self.outline.moved("".join(parts), {p: p + grown[n] for p, n in self.after.items()})


@dataclass(frozen=True)
class Proof:
    """The outlines of a shape with holes, and the questions on whose answers they rest."""

    sheet: Sheet
    forms: tuple[Form, ...]

    def filled(self, given: Sequence[str], tokens: Tokens) -> list[Outline] | None:
        """The outlines with these texts; None if they would answer otherwise, or write control tokens."""
        texts = self.sheet.texts(given)
        if not self.sheet.answered_alike(texts):
            return None
        made = [form.filled(texts) for form in self.forms]
        alike = all(o.control == [m.span() for m in tokens.control(o.text)] for o in made)
        return made if alike else None


class Shapes:
    """The proofs of one template, by shape."""

    def __init__(self, template: Template, tokens: Tokens) -> None:
        self.template, self.tokens = template, tokens
        self._proofs: dict[Shape, list[Proof]] = {}
        self._tries: dict[Shape, int] = {}

    def outlines(self, row: Conversation, inputs: Inputs, prove: Prove) -> list[Outline] | None:
        """The row's outlines by a proof for its shape, which is made at the second row that needs it."""
        found = _shape(row, inputs)
        if found is None:
            return None
        shape, texts = found
        if any(map(self.tokens.has_control, texts)):
            return None
        for proof in self._proofs.get(shape, ()):
            if (made := proof.filled(texts, self.tokens)) is not None:
                return made
        return self._learnt(shape, inputs, texts, prove)

    def _learnt(self, shape: Shape, inputs: Inputs, texts: list[str], prove: Prove) -> list[Outline] | None:
        if shape not in self._tries and len(self._tries) >= _MOST_SHAPES:
            return None
        tries = self._tries[shape] = self._tries.get(shape, 0) + 1
        if not 1 < tries <= 1 + _MOST_TRIES:
            return None
        try:
            proof = self._proof(inputs, prove)
        except (RowError, Undecided):
            return None
        made = proof.filled(texts, self.tokens)
        if made is not None:
            self._proofs.setdefault(shape, []).append(proof)
        return made

    def _proof(self, inputs: Inputs, prove: Prove) -> Proof:
        sheet = Sheet()
        row = _HoledRow(_HoledTemplate(self.template, sheet, inputs), _holed(inputs, sheet))
        outlines = [replace(o, control=[m.span() for m in self.tokens.control(o.text)]) for o in prove(row)]
        return Proof(sheet, tuple(map(Form.of, outlines)))


def _shape(row: Conversation, inputs: Inputs) -> tuple[Shape, list[str]] | None:
    """The shape and its texts; None for a row that has more than texts, or a text of white space alone."""
    if inputs.tools or inputs.documents or row.template_kwargs:
        return None
    shape: list[Any] = []
    texts: list[str] = []
    for given, m in zip(row.messages, inputs.messages, strict=True):
        if (
            not m.keys() <= _FIELDS
            or not all(isinstance(v, str) for v in m.values())
            or m["role"] not in ROLES
        ):
            return None
        said = [(k, v) for k, v in m.items() if k != "role"]
        reasoning = {v for k, v in said if k in REASONING_FIELDS}
        if len(reasoning) > 1 or any(v and not v.strip() for _, v in said):
            return None
        # A weight of 1 that the row itself gives isn't the same as none: see `Chats._asked_for`.
        shape.append((m["role"], given.get("weight"), *((k, bool(v)) for k, v in said)))
        texts += [m["content"]] if m.get("content") else []
        texts += [r for r in reasoning if r]
    return tuple(shape), texts


def _holed(inputs: Inputs, sheet: Sheet) -> Inputs:
    """The inputs with holes for their texts, in the order of `_shape`."""

    def holed(message: dict[str, Any]) -> dict[str, Any]:
        content = {"content": sheet.hole(message["content"])} if message.get("content") else {}
        thought = message.get(REASONING_FIELDS[0])
        hole = sheet.hole(thought) if thought else None
        return {**message, **content, **({k: hole for k in REASONING_FIELDS if k in message} if hole else {})}

    return replace(inputs, messages=tuple(map(holed, inputs.messages)))


class _HoledRow(Row):
    """Renderings with marks: where they part at one, its hole is asked whether its text parts there as well."""

    template: _HoledTemplate

    def begins(self, text: str, with_: str) -> bool:
        return text.startswith(with_) or self.common_prefix(text, with_) == len(with_)

    def common_prefix(self, a: str, b: str) -> int:
        at = common_prefix(a, b)
        for one, other in ((a, b), (b, a)):
            if MARK.match(one, at):
                self.template.sheet.holes[ord(one[at]) - FIRST].begins_otherwise(other[at:])
        return at


class _HoledTemplate(Template):
    """A template over holes: its renderings have their marks, which are their own origins."""

    def __init__(self, template: Template, sheet: Sheet, inputs: Inputs) -> None:
        super().__init__(template.source, template.variables)
        self.sheet = sheet
        self.places = [
            (i, name)
            for i, m in enumerate(inputs.messages)
            for name in ("content", REASONING_FIELDS[0])
            if m.get(name)
        ]

    def render(self, inputs: Inputs, *, add_generation_prompt: bool = False) -> str:
        asking: Any = environment(AskingEnvironment)
        asking.sheet = self.sheet
        return marked_text(self.pieces(AskingEnvironment, inputs, add_generation_prompt))

    def trace(self, marked: Marked, plain: str, *, add_generation_prompt: bool = False) -> Traced | None:
        runs: list[tuple[int, int]] = []
        for found in MARK.finditer(plain):
            if found.start() > (runs[-1][0] if runs else 0):
                runs.append((found.start(), TEMPLATE))
            runs.append((found.end(), 1 + ord(found[0]) - FIRST))
        if len(plain) > (runs[-1][0] if runs else 0):
            runs.append((len(plain), TEMPLATE))
        return Traced(
            text_with(plain, tuple(runs)), (Source("template"), *map(self._source, self.sheet.holes))
        )

    def _source(self, hole: Hole) -> Source:
        made = hole
        while made.made is not None:
            made = self.sheet.holes[made.made[0]]
        i, name = self.places[made.number]
        return Source(f"messages[{i}].{name}", i, name, hole.mark)
