"""Chat templates, rendered as transformers renders them, and once more with the origin of every character.

A `Renderer` is what the encoder needs of a template: `Template` renders texts, `symbolic.SymbolicTemplate` renders
placeholders in their stead.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import jinja2.meta

from ..errors import RowError
from .inputs import Inputs
from .origins import OriginsLost, join
from .sandbox import MAX_CHARACTERS, STATE, Environment, State, compiled, environment, over_budget
from .tracing import Marked, Traced, TracingEnvironment

_PLAIN: Any = Environment  # a class that mypy doesn't take for hashable


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
        compiled(source, _PLAIN)

    @cached_property
    def undeclared(self) -> frozenset[str]:
        """The names that the template reads and its caller has to give."""
        plain = environment(_PLAIN)
        names = jinja2.meta.find_undeclared_variables(plain.parse(self.source))
        return frozenset(names - set(plain.globals))

    def render(self, inputs: Inputs, *, add_generation_prompt: bool = False) -> str:
        """The text; raises RowError `template_error` with what the template says."""
        return "".join(self.pieces(_PLAIN, inputs, add_generation_prompt))

    def trace(self, marked: Marked, plain: str, *, add_generation_prompt: bool = False) -> Traced | None:
        """`plain` with the origin of each character (origins.py), or None where they can't be followed."""
        try:
            text = join(self.pieces(TracingEnvironment, marked.inputs, add_generation_prompt))
        except (RowError, OriginsLost):
            return None
        return Traced(text, marked.sources) if text == plain else None

    def begins(self, text: str, with_: str) -> bool:
        """Whether a rendering begins with another."""
        return text.startswith(with_)

    def common_prefix(self, a: str, b: str) -> int:
        """The length of the common prefix of two renderings."""
        return common_prefix(a, b)

    def pieces(self, kind: Any, inputs: Inputs, prompt: bool) -> list[Any]:
        """What the template writes, piece by piece, in an environment of this kind."""
        template = compiled(self.source, kind)
        context = template.new_context(
            {
                "messages": list(inputs.messages),
                "tools": inputs.tools,
                "documents": inputs.documents,
                "add_generation_prompt": prompt,
                **self.variables,
                **inputs.kwargs,
                STATE: State(inputs),
            }
        )
        pieces: list[Any] = []
        size, size_of = 0, kind.size
        try:
            for piece in template.root_render_func(context):
                pieces.append(piece)
                size += size_of(piece)
                if size > MAX_CHARACTERS:
                    raise over_budget(f"more than {MAX_CHARACTERS:,} characters")
        except (RowError, OriginsLost):
            raise
        except RecursionError:
            raise over_budget("endless recursion") from None
        except Exception as e:  # a template is someone's program: whatever it raises is about this row
            raise RowError(
                "the chat template fails",
                reason="template_error",
                why=f"{type(e).__name__}: {e}",
                fix="mend the row as the template says, or give another template",
            ) from e
        return pieces


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
