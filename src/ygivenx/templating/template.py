"""Chat templates, rendered as transformers renders them, and once more with the origin of every character.

A `Renderer` is what the encoder needs of a template: `Template` renders texts, `symbolic.SymbolicTemplate` renders
placeholders in their stead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import jinja2.meta

from ..errors import RowError
from . import confined
from .inputs import Inputs
from .origins import OriginsLost, Text, join_texts, runs_of
from .sandbox import STATE, Environment, Outside, State, compiled, environment, over_budget
from .tracing import Marked, Traced, TracingEnvironment

_PLAIN: Any = Environment  # a class that mypy doesn't take for hashable
MAX_CHARACTERS = 1 << 20  # of a rendering; those of long rows may have more
SMALL = 10_000  # characters of a row that every template has to render in its time


class Renderer(Protocol):
    """Renders conversations, and compares its renderings."""

    source: str

    @property
    def undeclared(self) -> frozenset[str]: ...
    def render(self, inputs: Inputs, *, add_generation_prompt: bool = False) -> str: ...
    def trace(self, marked: Marked, plain: str, *, add_generation_prompt: bool = False) -> Traced | None: ...
    def begins(self, text: str, with_: str) -> bool: ...
    def common_prefix(self, a: str, b: str) -> int: ...


class Template:
    """A compiled chat template; `variables` are the tokenizer's special tokens by name."""

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        self.source, self.variables = source, dict(variables or {})
        self.is_outside = False  # whether it is rendered in a process with limits
        self.refusal: RowError | None = None
        try:
            compiled(source, _PLAIN)
        except Outside:
            self.is_outside = True

    @cached_property
    def undeclared(self) -> frozenset[str]:
        """The names that the template reads and its caller has to give."""
        plain = environment(_PLAIN)
        try:
            names = jinja2.meta.find_undeclared_variables(plain.parse(self.source))
        except Outside:
            return confined.names(self.source)
        return frozenset(names - set(plain.globals))

    def render(self, inputs: Inputs, *, add_generation_prompt: bool = False) -> str:
        """The text; raises RowError `template_error` with what the template says, and `template_budget`."""
        text: str = self._rendered(_PLAIN, inputs, add_generation_prompt, "".join)
        if not text.isascii():
            _refuse_surrogates(text)
        return text

    def trace(self, marked: Marked, plain: str, *, add_generation_prompt: bool = False) -> Traced | None:
        """`plain` with the origin of each character (origins.py), or None where they can't be followed."""
        try:
            text = self._rendered(TracingEnvironment, marked.inputs, add_generation_prompt, join_texts)
        except (RowError, OriginsLost):
            return None
        return Traced(text, marked.sources) if text == plain else None

    def _rendered(self, kind: Any, inputs: Inputs, prompt: bool, joined: Callable[[list[Any]], Any]) -> Any:
        """In this process, or in one with limits where the template does what isn't done here."""
        if refusal := self.refusal or inputs.used.refusal:
            raise refusal
        try:
            if not self.is_outside:
                try:
                    return joined(self.pieces(kind, inputs, prompt))
                except Outside:
                    self.is_outside = True
            return confined.render(self.source, self.variables, inputs, prompt, kind is not _PLAIN)
        except RowError as e:
            if e.reason == "template_budget":
                inputs.used.refusal = e  # this row has had its time
                if inputs.size < SMALL:
                    self.refusal = e
            raise

    def answer(self, inputs: Inputs, prompt: bool, traced: bool) -> dict[str, Any]:
        """What a process with limits answers: the text, and its runs if traced."""
        if not traced:
            return {"text": self.render(inputs, add_generation_prompt=prompt)}
        text: Text = join_texts(self.pieces(TracingEnvironment, inputs, prompt))
        return {"text": text, "runs": runs_of(text)}

    def begins(self, text: str, with_: str) -> bool:
        """Whether a rendering begins with another."""
        return text.startswith(with_)

    def common_prefix(self, a: str, b: str) -> int:
        """The length of the common prefix of two renderings."""
        return common_prefix(a, b)

    def pieces(self, kind: Any, inputs: Inputs, prompt: bool) -> list[Any]:
        """What the template writes, piece by piece, in an environment of this kind; raises Outside."""
        template, state = compiled(self.source, kind), State(inputs)
        context = template.new_context(
            {
                "messages": list(inputs.messages),
                "tools": inputs.tools,
                "documents": inputs.documents,
                "add_generation_prompt": prompt,
                **self.variables,
                **inputs.kwargs,
                STATE: state,
            }
        )
        pieces: list[Any] = []
        size, size_of, most = 0, kind.size, MAX_CHARACTERS
        try:
            for piece in template.root_render_func(context):
                pieces.append(piece)
                size += size_of(piece)
                if size > most:
                    most = _more_characters(inputs, size)
        except (RowError, OriginsLost, Outside, MemoryError):
            raise
        except RecursionError:
            raise over_budget("endless recursion") from None
        except Exception as e:  # a template is someone's program: whatever it raises is about this row
            raise RowError(
                "the chat template fails",
                reason="template_error",
                why=f"{type(e).__name__}: {str(e)[:1000]}",
                fix="mend the row as the template says, or give another template",
            ) from e
        finally:
            state.end()
        return pieces


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RowError(
            "the chat template writes half a character",
            reason="template_error",
            why=f"{text[e.start]!r} at character {e.start} is one half of a surrogate pair, which isn't text",
            fix="mend the template",
        ) from e


def _more_characters(inputs: Inputs, size: int) -> int:
    """How many characters the rendering of a long row may have."""
    most = MAX_CHARACTERS + 16 * inputs.size
    if size > most:
        raise over_budget(f"more than {most:,} characters of a row of {inputs.size:,}")
    return most


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
