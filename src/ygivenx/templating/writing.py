"""Values that hold texts, written as text: printed, put in a pattern, as JSON; each character keeps its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .origins import TEMPLATE, OriginsLost, Text, join_texts, runs_of


def join_any(parts: Iterable[Any]) -> Text:
    """Jinja's `~` and buffers: anything, as text."""
    return join_texts([p if isinstance(p, str) else as_text(p) for p in parts])


def as_text(value: Any) -> str:
    """str(value), which prints a container as Python does."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | Mapping) and has_origin(value):
        return join_texts(_repr(value))
    return str(value)


def has_origin(value: Any) -> bool:
    """Whether a row's text is in a value."""
    return any(_sources(value))


def _repr(value: Any) -> Iterator[str]:
    """repr(value), as a template that prints a container writes it."""
    if isinstance(value, Text):
        yield value.made_into(repr(str.__str__(value)))
    elif isinstance(value, Mapping):
        for i, (key, item) in enumerate(value.items()):
            yield ", " if i else "{"
            yield from _repr(key)
            yield ": "
            yield from _repr(item)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield ", " if i else "["
            yield from _repr(item)
        yield "]" if value else "[]"
    elif isinstance(value, tuple):
        raise OriginsLost
    else:
        yield repr(value)


def _sources(value: Any) -> Iterator[int]:
    if isinstance(value, Text):
        yield from (source for _, source in value.runs)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _sources(key)
            yield from _sources(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sources(item)


def percent(pattern: str, values: Any) -> Text:
    """`pattern % values` where only plain %s takes texts with an origin."""
    items = values if isinstance(values, tuple) else (values,)
    if isinstance(values, Mapping) or str.count(pattern, "%") != str.count(pattern, "%s"):
        if has_origin(pattern) or has_origin(values):
            raise OriginsLost
        return Text.of(str.__mod__(str.__str__(pattern), values), TEMPLATE)
    return _filled(Text.split(_as_origin(pattern), "%s"), items)


def braces(pattern: str, plain: Callable[..., str], *values: Any, **named: Any) -> str:
    """`pattern.format(...)`, which `plain` makes, where only a plain {} takes texts with an origin."""
    if not has_origin((pattern, values, named)):
        return plain(*values, **named)
    words = str.split(pattern, "{}")
    if has_origin(pattern) or named or set("{}") & set("".join(words)):
        raise OriginsLost
    return _filled(words, values)


def _filled(words: list[str], values: tuple[Any, ...]) -> Text:
    if len(words) != len(values) + 1:
        raise OriginsLost
    return join_any([words[0], *(x for pair in zip(values, words[1:], strict=True) for x in pair)])


def _as_origin(text: str) -> Text:
    return text if isinstance(text, Text) else Text.of(text, TEMPLATE)


class Owned(dict[Any, Any]):
    """An object all of whose text has one source, so that its JSON has it too."""

    source: int


def owned(value: Any, source: int) -> Any:
    """A JSON value with each text of one source."""
    if isinstance(value, str):
        return Text.of(value, source)
    if isinstance(value, Mapping):
        result = Owned((owned(k, source), owned(v, source)) for k, v in value.items())
        result.source = source
        return result
    return [owned(v, source) for v in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, *, ensure_ascii: bool, indent: Any, separators: Any, sort_keys: bool) -> str:
    """`json.dumps` of a value with texts inside; what isn't a text belongs to the key or text beside it."""
    comma, colon = separators or ((", ", ": ") if indent is None else (",", ": "))
    space = None if indent is None else (indent if isinstance(indent, str) else " " * indent)
    options = _Json(ensure_ascii, space, comma, colon, sort_keys)
    return join_texts(options.value(value, 0, TEMPLATE))


@dataclass(frozen=True, slots=True)
class _Json:
    ensure_ascii: bool
    indent: str | None
    comma: str
    colon: str
    sort_keys: bool

    def value(self, value: Any, level: int, owner: int) -> Iterator[str]:
        if isinstance(value, str):
            yield from self.string(value)
        elif isinstance(value, Owned) and self.indent is None and not self.sort_keys:
            separators = (self.comma, self.colon)
            yield Text.of(
                json.dumps(value, ensure_ascii=self.ensure_ascii, separators=separators), value.source
            )
        elif isinstance(value, Mapping):
            items = sorted(value.items()) if self.sort_keys else value.items()
            pairs = [self.member(k, v, level + 1) for k, v in items]
            yield from self.block("{", pairs, "}", level)
        elif isinstance(value, list | tuple):
            yield from self.block("[", [self.value(v, level + 1, owner) for v in value], "]", level)
        else:
            yield Text.of(json.dumps(value, ensure_ascii=self.ensure_ascii), owner)

    def member(self, key: Any, value: Any, level: int) -> Iterator[str]:
        if isinstance(key, str):
            yield from self.string(key)
        else:
            yield json.dumps({key: 0})[1:-4]
        yield self.colon
        yield from self.value(value, level, next(_sources(key), TEMPLATE))

    def string(self, text: str) -> Iterator[str]:
        yield '"'
        start = 0
        for stop, source in runs_of(text):
            piece = str.__getitem__(text, slice(start, stop))
            yield Text.of(json.dumps(piece, ensure_ascii=self.ensure_ascii)[1:-1], source)
            start = stop
        yield '"'

    def block(self, opening: str, items: list[Iterator[str]], closing: str, level: int) -> Iterator[str]:
        yield opening
        for i, item in enumerate(items):
            yield self.comma if i else ""
            if self.indent is not None:
                yield "\n" + self.indent * (level + 1)
            yield from item
        if items and self.indent is not None:
            yield "\n" + self.indent * level
        yield closing
