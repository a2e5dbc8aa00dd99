"""The nouns of the encoder, from a row to the tokenizer: renderings, turns, candidates.

A conversation under a template has many renderings (`Renderings` makes each once). A `Turn` says which characters of
one of them a reply is, a `Rendering` is a text with the turns that it trains, and a `Candidate` is all the texts of a
row, ready to be encoded. A candidate is proven when its ids are, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..templating.inputs import Inputs
from ..templating.origins import TEMPLATE, Text
from ..templating.template import Renderer
from ..templating.tracing import Marked, Traced, marked
from .segments import Outline
from .thoughts import Tags

SHOWN = 40  # characters of a text that an error quotes


@dataclass(frozen=True, slots=True)
class Turn:
    """Message `message` is produced as text[start:stop], of which text[end:stop] is the token that ends it.

    `text` is at least P + O. is_apart: what stands before `start` is encoded by itself. notes: what was mended.
    """

    message: int
    text: str
    start: int
    end: int
    stop: int
    traced: Traced | None = None  # of a text that a repair put together
    notes: tuple[str, ...] = ()
    is_apart: bool = False

    @property
    def proven(self) -> str:
        """P + O."""
        return self.text[: self.stop]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A text to be encoded, with the turns that it trains; `upto`: it renders messages[:upto]."""

    text: str
    turns: tuple[Turn, ...]
    upto: int
    traced: Traced | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """The texts of a row, one or one for each turn. notes: what a strategy changed of the row's inputs."""

    outlines: tuple[Outline, ...]
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[tuple[str, tuple[int, ...]]]:
        """(text, the characters at which it is cut and its parts are encoded apart) of each."""
        return [(o.text, o.cuts) for o in self.outlines]


class Renderings:
    """One conversation under one template: its renderings, each made once."""

    def __init__(self, renderer: Renderer, inputs: Inputs, tags: Tags) -> None:
        self.renderer, self.inputs, self.tags = renderer, inputs, tags
        self._prompts: dict[int, str] = {}
        self._closed: dict[int, str] = {}
        self._traced: dict[int, Traced | None] = {}

    def __len__(self) -> int:
        return len(self.inputs.messages)

    def prompt(self, i: int) -> str:
        """P: what inference shows before message i."""
        if i not in self._prompts:
            self._prompts[i] = self.renderer.render(self.inputs.upto(i), add_generation_prompt=True)
        return self._prompts[i]

    def closed(self, stop: int) -> str:
        """F: messages[:stop] and nothing after them."""
        if stop not in self._closed:
            self._closed[stop] = self.renderer.render(self.inputs.upto(stop))
        return self._closed[stop]

    @cached_property
    def marked(self) -> Marked:
        """The inputs, each text with its origin."""
        return marked(self.inputs)

    def traced(self, stop: int) -> Traced | None:
        """`closed(stop)` with the origin of each character, where that can be known."""
        if stop not in self._traced:
            self._traced[stop] = self.renderer.trace(self.marked.upto(stop), self.closed(stop))
        return self._traced[stop]

    def traced_prompt(self, i: int) -> Traced | None:
        """`prompt(i)` likewise."""
        return self.renderer.trace(self.marked.upto(i), self.prompt(i), add_generation_prompt=True)

    def text_of(self, text: str, i: int, field: str) -> Text:
        """A text that comes from a field of message i."""
        sources = enumerate(self.marked.sources)
        return Text.of(text, next((n for n, s in sources if (s.message, s.field) == (i, field)), TEMPLATE))

    @cached_property
    def whole(self) -> str:
        """The rendering of all messages."""
        return self.closed(len(self))

    def replies(self) -> list[int]:
        """The messages that are the assistant's."""
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
