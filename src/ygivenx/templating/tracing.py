"""The sandbox over `Text`: templates rendered with the origin of every character.

What would make a plain str of a text is replaced: concatenation, `str`, filters, `%`. A filter that knows nothing of
origins keeps that of its one argument; with several it declines, since a wrong origin is worse than none.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jinja2
import jinja2.filters

from .inputs import Inputs
from .origins import TEMPLATE, OriginsLost, Source, Text, join_texts
from .sandbox import Environment, measured
from .writing import Owned, as_text, braces, has_origin, join_any, owned, percent, to_json


@dataclass(frozen=True)
class Traced:
    """A rendered text with runs of indices into `sources`; sources[0] is the template."""

    text: Text
    sources: tuple[Source, ...]

    @cached_property
    def spoken(self) -> defaultdict[int | None, list[tuple[int, int]]]:
        """Characters [start, stop) of what each message says, its role's name apart."""
        spoken: defaultdict[int | None, list[tuple[int, int]]] = defaultdict(list)
        at = 0
        for stop, s in self.text.runs:
            source = self.sources[s]
            if source.field != "role":
                spoken[source.message].append((at, stop))
            at = stop
        return spoken


@dataclass(frozen=True)
class Marked:
    """Inputs whose strings are `Text`s, each an index into `sources`."""

    inputs: Inputs
    sources: tuple[Source, ...]

    def upto(self, stop: int) -> Marked:
        return replace(self, inputs=self.inputs.upto(stop))


def marked(inputs: Inputs) -> Marked:
    """The inputs with each string of a message as a Text of a source of its own; tools, documents and
    arguments have one source each."""
    sources: list[Source] = [Source("template")]

    def mark(value: Any, path: str, message: int, name: str) -> Any:
        if isinstance(value, str):
            sources.append(Source(path, message, name, value))
            return Text.of(value, len(sources) - 1)
        if isinstance(value, Mapping):
            return {
                mark(k, f"{path}.{k} (key)", message, name): mark(v, f"{path}.{k}", message, name)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [mark(v, f"{path}[{i}]", message, name) for i, v in enumerate(value)]
        return value

    def mark_whole(value: Any, path: str) -> Any:
        sources.append(Source(path))
        return owned(value, len(sources) - 1)

    messages = tuple(
        {k: mark(v, f"messages[{i}].{k}", i, k) for k, v in m.items()} for i, m in enumerate(inputs.messages)
    )
    tools = None if inputs.tools is None else mark_whole(inputs.tools, "tools")
    documents = None if inputs.documents is None else mark_whole(inputs.documents, "documents")
    kwargs = {k: mark_whole(v, k) for k, v in inputs.kwargs.items()}
    return Marked(Inputs(messages, tools, documents, kwargs, inputs.now, used=inputs.used), tuple(sources))


# Filters that hand on what they are given.
_PASSING = {
    *["_metered", "_kept", "default", "d", "items", "map", "select", "reject", "selectattr", "rejectattr"]
}


class TracingEnvironment(Environment):
    """The same over `Text`: what would make a plain str of one is replaced."""

    texts = (str, Text)

    @staticmethod
    def concat(parts: Any) -> Text:
        return join_texts(measured(parts))

    @staticmethod
    def own_names() -> dict[str, Any]:
        return {"str": as_text, "str_join": _join_checked, "markup_join": _join_checked}

    def adapt(self) -> None:
        self.filters = {k: f if k in _PASSING else _guarded(f) for k, f in self.filters.items()}
        self.filters |= {
            "tojson": _tojson_traced,
            "join": jinja2.pass_environment(_join_filter),
            "replace": _replace_filter,
            "format": _format_filter,
            "indent": _indent_filter,
            "string": as_text,
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str) and self.everything:
            return percent(left, right)  # a plain pattern % a tuple of texts would be plain
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(_wrapped(obj) if type(obj) is str else obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(_wrapped(obj), argument)

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        plain = super().wrap_str_format(getattr(str.__str__(value.__self__), value.__name__))
        return plain and partial(braces, value.__self__, plain)


def _join_checked(parts: Any) -> Text:
    return join_texts(measured(map(as_text, parts)))


def _wrapped(obj: Any) -> Any:
    return Text.of(obj, TEMPLATE) if type(obj) is str else obj


def _tojson_traced(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    if not isinstance(x, str | list | tuple | Mapping):
        return json.dumps(x, sort_keys=sort_keys, **options)
    if isinstance(x, Owned):
        return Text.of(json.dumps(x, sort_keys=sort_keys, **options), x.source)
    return to_json(x, sort_keys=sort_keys, **options)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that knows nothing of origins: a str that it makes of one text keeps its source."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not isinstance(result, str) or isinstance(result, Text):
            return result
        texts = [a for a in (*args, *kwargs.values()) if has_origin(a)]
        if not texts:
            return result
        if len(texts) > 1 or not isinstance(texts[0], Text):
            raise OriginsLost
        return texts[0].made_into(result)

    for mark in ("jinja_pass_arg",):
        if hasattr(function, mark):
            setattr(call, mark, getattr(function, mark))
    return call


def _join_filter(environment: Any, value: Any, d: str = "", attribute: Any = None) -> Text:
    if attribute is not None:
        get = jinja2.filters.make_attrgetter(environment, attribute)
        value = map(get, value)
    parts: list[Any] = []
    for i, item in enumerate(value):
        parts += [d, item] if i else [item]
    return join_any(parts)


def _replace_filter(s: Any, old: Any, new: Any, count: int | None = None) -> Text:
    return Text.replace(_wrapped(as_text(s)), as_text(old), as_text(new), -1 if count is None else count)


def _format_filter(value: Any, *args: Any, **kwargs: Any) -> Text:
    return percent(as_text(value), kwargs or args)


def _indent_filter(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Text:
    indention = width if isinstance(width, str) else " " * width
    lines = Text.splitlines(join_texts([s, "\n"]))
    out: list[str] = []
    for i, line in enumerate(lines):
        indented = first if i == 0 else bool(line) or blank
        out += ["\n"] if i else []
        out += [indention, line] if indented else [line]
    return join_texts(out)
