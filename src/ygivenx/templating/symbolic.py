"""Templates rendered over placeholders: what could look into one without asking it is replaced, or undecided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jinja2.filters import do_default

from .inputs import REASONING_FIELDS, Inputs
from .origins import TEMPLATE, Source, text_with
from .placeholders import (
    FIRST,
    MARK,
    Opaque,
    PathConditions,
    Placeholder,
    Undecided,
    as_written,
    concatenated,
    text_with_marks,
    undecided,
)  # fmt: skip
from .sandbox import Environment, Outside
from .template import Template, common_prefix
from .tracing import Marked, Traced

_OF_STR = frozenset(dir(str))
_METHODS = frozenset(n for n in vars(Placeholder) if n in _OF_STR and n[0] != "_")
# What tests say of every text; the others compare, or aren't asked of what can't be looked into.
_TESTS = {
    **dict.fromkeys("string sequence iterable defined".split(), True),
    **dict.fromkeys("mapping number integer float boolean none undefined callable true false".split(), False),
}
_COMPARING = {"eq", "equalto", "==", "ne", "!=", "in"}
_FILTERS: dict[str, Callable[..., Any]] = {
    "trim": lambda text, chars=None: text.strip(chars),
    "string": lambda text: text,
    "_kept": lambda context, text: text,
    **dict.fromkeys(("default", "d"), do_default),
}


class SymbolicEnvironment(Environment):
    """The sandbox over placeholders."""

    concat: Any = staticmethod(concatenated)
    size = staticmethod(lambda piece: 1)

    @staticmethod
    def own_names() -> dict[str, Any]:
        join = concatenated
        return {"str": as_written, "str_join": join, "markup_join": join}

    def adapt(self) -> None:
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {k: _test_of(k, f) for k, f in tests.items()}
        self.filters = {k: _filter_of(k, f) for k, f in self.filters.items()}
        self.filters["random"] = self.globals["lipsum"] = undecided

    def getattr(self, obj: Any, attribute: str) -> Any:
        return (
            self._of_placeholder(obj, attribute)
            if isinstance(obj, Opaque)
            else super().getattr(obj, attribute)
        )

    def getitem(self, obj: Any, argument: Any) -> Any:
        return (
            self._of_placeholder(obj, argument) if isinstance(obj, Opaque) else super().getitem(obj, argument)
        )

    def _of_placeholder(self, obj: Any, name: Any) -> Any:
        """A method that a placeholder has; nothing where a str has nothing of this name."""
        if isinstance(name, str) and name not in _OF_STR:
            return self.undefined(obj="a text", name=name)
        if name in _METHODS and isinstance(obj, Placeholder):
            return getattr(obj, name)
        raise Undecided


def _test_of(name: str, test: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(a, Opaque) for a in args) or name in _COMPARING:
            return test(*args, **kwargs)
        if name in _TESTS and isinstance(args[0], Opaque):
            return _TESTS[name]
        raise Undecided

    return _with_pass_mark(call, test)


def _filter_of(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(a, Opaque) for a in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        return _FILTERS.get(name, undecided)(*args, **kwargs)

    return _with_pass_mark(call, function)


def _with_pass_mark(call: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The mark by which Jinja knows that a function takes its environment or context first."""
    if hasattr(function, "jinja_pass_arg"):
        vars(call)["jinja_pass_arg"] = function.jinja_pass_arg
    return call


class SymbolicTemplate:
    """A template over placeholders: its renderings have their marks, which are their own origins.

    inputs: a row's, whose contents and reasoning become placeholders in `self.inputs`, in that order.
    """

    def __init__(self, template: Template, inputs: Inputs) -> None:
        self.template, self.source = template, template.source
        self.conditions = PathConditions()
        self.places = [
            (i, name)
            for i, m in enumerate(inputs.messages)
            for name in ("content", REASONING_FIELDS[0])
            if m.get(name)
        ]
        self.inputs = replace(inputs, messages=tuple(map(self._with_placeholders, inputs.messages)))

    def _with_placeholders(self, message: dict[str, Any]) -> dict[str, Any]:
        result = dict(message)
        if message.get("content"):
            result["content"] = self.conditions.placeholder(message["content"])
        if thought := message.get(REASONING_FIELDS[0]):
            placeholder = self.conditions.placeholder(thought)
            result |= {k: placeholder for k in REASONING_FIELDS if k in message}
        return result

    @property
    def undeclared(self) -> frozenset[str]:
        return self.template.undeclared

    def render(self, inputs: Inputs, *, add_generation_prompt: bool = False) -> str:
        """The text with marks; raises Undecided where it depends on more of a text than its answers."""
        kind: Any = SymbolicEnvironment
        if self.template.is_outside or self.template.refusal:
            raise Undecided
        try:
            return text_with_marks(self.template.pieces(kind, inputs, add_generation_prompt))
        except Outside as e:
            raise Undecided from e

    def trace(self, marked: Marked, plain: str, *, add_generation_prompt: bool = False) -> Traced | None:
        """`plain` with the origin of each character: a mark is its placeholder's, all else the template's."""
        runs: list[tuple[int, int]] = []
        for found in MARK.finditer(plain):
            if found.start() > (runs[-1][0] if runs else 0):
                runs.append((found.start(), TEMPLATE))
            runs.append((found.end(), 1 + ord(found[0]) - FIRST))
        if len(plain) > (runs[-1][0] if runs else 0):
            runs.append((len(plain), TEMPLATE))
        sources = (Source("template"), *map(self._source, self.conditions.placeholders))
        return Traced(text_with(plain, tuple(runs)), sources)

    def _source(self, placeholder: Placeholder) -> Source:
        first = placeholder
        while first.derived_from is not None:
            first = self.conditions.placeholders[first.derived_from[0]]
        i, name = self.places[first.number]
        return Source(f"messages[{i}].{name}", i, name, placeholder.mark)

    def begins(self, text: str, with_: str) -> bool:
        """Whether a rendering begins with another, for all texts that answer alike."""
        return text.startswith(with_) or self.common_prefix(text, with_) == len(with_)

    def common_prefix(self, a: str, b: str) -> int:
        """The length of the common prefix. Where it ends at a mark, the text is asked whether they part there too."""
        at = common_prefix(a, b)
        for one, other in ((a, b), (b, a)):
            if MARK.match(one, at):
                self.conditions.placeholders[ord(one[at]) - FIRST].require_other_beginning(other[at:])
        return at
