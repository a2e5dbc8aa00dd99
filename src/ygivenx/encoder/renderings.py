"""The renderings of one conversation, each made once, and how they compare."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .inputs import Inputs
from .origins import TEMPLATE, Text
from .template import Template
from .tracing import Marked, Traced, marked

SHOWN = 40  # characters of a text that an error quotes


@dataclass(frozen=True, slots=True)
class Turn:
    """Message `message` is produced as text[start:stop], of which text[end:stop] is the token that ends it.

    `text` is at least P + O, `notes` what was mended.
    """

    message: int
    text: str
    start: int
    end: int
    stop: int
    traced: Traced | None = None  # of a text that a repair put together
    notes: tuple[str, ...] = ()

    @property
    def proven(self) -> str:
        """P + O."""
        return self.text[: self.stop]


@dataclass(frozen=True, slots=True)
class Draft:
    """A text to be encoded, with the turns that it trains; `upto`: it renders messages[:upto]."""

    text: str
    turns: tuple[Turn, ...]
    upto: int
    traced: Traced | None = None
    notes: tuple[str, ...] = ()


class Row:
    """One conversation under one template: its renderings, each made once."""

    def __init__(self, template: Template, inputs: Inputs) -> None:
        self.template, self.inputs = template, inputs
        self._prompts: dict[int, str] = {}
        self._closed: dict[int, str] = {}
        self._traced: dict[int, Traced | None] = {}

    def __len__(self) -> int:
        return len(self.inputs.messages)

    def prompt(self, i: int) -> str:
        """P: what inference shows before message i."""
        if i not in self._prompts:
            self._prompts[i] = self.template.render(self.inputs.upto(i), add_generation_prompt=True)
        return self._prompts[i]

    def closed(self, stop: int) -> str:
        """F: messages[:stop] and nothing after them."""
        if stop not in self._closed:
            self._closed[stop] = self.template.render(self.inputs.upto(stop))
        return self._closed[stop]

    @cached_property
    def marked(self) -> Marked:
        return marked(self.inputs)

    def traced(self, stop: int) -> Traced | None:
        """`closed(stop)` with the origin of each character, where that can be known."""
        if stop not in self._traced:
            self._traced[stop] = self.template.trace(self.marked.upto(stop), self.closed(stop))
        return self._traced[stop]

    def traced_prompt(self, i: int) -> Traced | None:
        """`prompt(i)` likewise."""
        return self.template.trace(self.marked.upto(i), self.prompt(i), add_generation_prompt=True)

    def said(self, text: str, i: int, field: str) -> Text:
        """A text that comes from a field of message i."""
        sources = enumerate(self.marked.sources)
        return Text.of(text, next((n for n, s in sources if (s.message, s.field) == (i, field)), TEMPLATE))

    @cached_property
    def whole(self) -> str:
        return self.closed(len(self))

    def begins(self, text: str, with_: str) -> bool:
        """Whether a rendering begins with another."""
        return text.startswith(with_)

    def common_prefix(self, a: str, b: str) -> int:
        """The length of the common prefix of two renderings."""
        return common_prefix(a, b)

    def replies(self) -> list[int]:
        return [i for i, m in enumerate(self.inputs.messages) if m.get("role") == "assistant"]


def runs_of_message(traced: Traced, message: int) -> list[tuple[int, int]]:
    """Characters [start, stop) of what a message says, its role's name apart."""
    runs, at = [], 0
    for stop, s in traced.text.runs:
        source = traced.sources[s]
        if source.message == message and source.field != "role":
            runs.append((at, stop))
        at = stop
    return runs


def quoted(text: str) -> str:
    """A text as an error shows it."""
    return repr(text) if len(text) <= SHOWN else repr(text[:SHOWN]) + "…"


def common_prefix(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
