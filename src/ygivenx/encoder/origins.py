"""Text that knows, for each character, which field of a row it came from.

`Text` is a `str` that carries runs of sources through everything that chat templates do to strings: slicing,
strip, split, partition, replace, join, case, `+`, `*`, `%`. Source 0 is the template itself. A method that
can't say where its characters come from raises `OriginsLost`: a wrong origin is worse than none.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

TEMPLATE = 0
Runs = tuple[tuple[int, int], ...]  # (stop, source), stops increasing up to the length


class OriginsLost(Exception):
    """An operation on a text whose characters can't be followed through it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A string of a row: `path` such as `messages[2].content`; message and field are None elsewhere."""

    path: str
    message: int | None = None
    field: str | None = None
    text: str = ""


class Text(str):
    """A str with runs of sources; see the module."""

    __slots__ = ("runs",)
    runs: Runs

    @staticmethod
    def of(text: str, source: int) -> Text:
        made = Text(text)
        made.runs = ((len(text), source),) if text else ()
        return made

    def __str__(self) -> Text:  # str(x) would drop the runs
        return self

    def __reduce__(self) -> Any:
        return text_with, (str.__str__(self), self.runs)

    def __getitem__(self, key: SupportsIndex | slice) -> Text:
        if not isinstance(key, slice):
            i = index(key)
            key = slice(i, i + 1 or None)
            if not -len(self) <= i < len(self):
                raise IndexError("string index out of range")
        start, stop, step = key.indices(len(self))
        if step == 1:
            return _cut(self, start, max(start, stop))
        return join([_cut(self, i, i + 1) for i in range(start, stop, step)])

    def __iter__(self) -> Iterator[Text]:
        return (_cut(self, i, i + 1) for i in range(len(self)))

    def __add__(self, other: str) -> Text:
        return join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Text:
        return join((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Text:
        return join([self] * times.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Text:
        return percent(self, values)

    def __rmod__(self, other: str) -> Text:
        return percent(other, self)

    def strip(self, chars: str | None = None, /) -> Text:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Text:
        return _cut(self, len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Text:
        return _cut(self, 0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> Text:
        return _cut(self, len(prefix) if str.startswith(self, prefix) else 0, len(self))

    def removesuffix(self, suffix: str, /) -> Text:
        return _cut(self, 0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return _locate(self, str.split(self, sep, maxsplit))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        parts = [p[::-1] for p in reversed(str.rsplit(self, sep, maxsplit))]
        mirrored = _locate(self[::-1], parts)
        return [p[::-1] for p in reversed(mirrored)]

    def splitlines(self, keepends: bool = False) -> list[str]:
        return _locate(self, str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = str.partition(self, sep)
        return self[: len(head)], self[len(head) : len(head) + len(middle)], self[len(self) - len(tail) :]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = str.rpartition(self, sep)
        return self[: len(head)], self[len(head) : len(head) + len(middle)], self[len(self) - len(tail) :]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Text:
        if not old:
            return self.made_into(str.replace(self, old, new, count))
        pieces: list[str] = []
        at, left = 0, count.__index__()
        while left and (found := str.find(self, old, at)) >= 0:
            pieces += [_cut(self, at, found), new]
            at, left = found + len(old), left - 1
        return join([*pieces, _cut(self, at, len(self))]) if pieces else self

    def join(self, parts: Iterable[str], /) -> Text:
        pieces: list[str] = []
        for i, part in enumerate(parts):
            if not isinstance(part, str):
                raise TypeError(f"sequence item {i}: expected str instance, {type(part).__name__} found")
            pieces += [self, part] if i else [part]
        return join(pieces)

    def made_into(self, result: str) -> Text:
        """`result` was made of this text alone: right where it has one source or kept its length."""
        made = Text(result)
        if len(self.runs) <= 1:
            made.runs = ((len(result), self.runs[0][1] if self.runs else TEMPLATE),) if result else ()
        elif len(result) == len(self):
            made.runs = self.runs
        else:
            raise OriginsLost
        return made

    def upper(self) -> Text:
        return self.made_into(str.upper(self))

    def lower(self) -> Text:
        return self.made_into(str.lower(self))

    def title(self) -> Text:
        return self.made_into(str.title(self))

    def capitalize(self) -> Text:
        return self.made_into(str.capitalize(self))

    def swapcase(self) -> Text:
        return self.made_into(str.swapcase(self))

    def casefold(self) -> Text:
        return self.made_into(str.casefold(self))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> Text:
        return self.made_into(str.expandtabs(self, tabsize))

    def zfill(self, width: SupportsIndex, /) -> Text:
        return self.made_into(str.zfill(self, width))

    def center(self, width: SupportsIndex, fill: str = " ", /) -> Text:
        return self.made_into(str.center(self, width, fill))

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> Text:
        return join((self, fill * (width.__index__() - len(self))))

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> Text:
        return join((fill * (width.__index__() - len(self)), self))

    def translate(self, table: Any, /) -> Text:
        return self.made_into(str.translate(self, table))


class Owned(dict[Any, Any]):
    """An object all of whose text has one source, so that its JSON has it too."""

    source: int


def owned(value: Any, source: int) -> Any:
    """A JSON value with each text of one source."""
    if isinstance(value, str):
        return Text.of(value, source)
    if isinstance(value, Mapping):
        made = Owned((owned(k, source), owned(v, source)) for k, v in value.items())
        made.source = source
        return made
    return [owned(v, source) for v in value] if isinstance(value, list | tuple) else value


def text_with(text: str, runs: Runs) -> Text:
    """A text of known runs."""
    made = Text(text)
    made.runs = runs
    return made


def runs_of(text: str) -> Runs:
    """The runs of a text; a plain one is the template's."""
    if isinstance(text, Text):
        return text.runs
    return ((len(text), TEMPLATE),) if text else ()


def within(runs: Runs, start: int, stop: int) -> Iterator[int]:
    """The sources of characters [start, stop)."""
    for end, source in runs[bisect_right(runs, start, key=lambda r: r[0]) :]:
        yield source
        if end >= stop:
            return


def source_at(text: Text, position: int) -> int:
    """The source of one character."""
    return text.runs[bisect_right(text.runs, position, key=lambda r: r[0])][1]


def _cut(text: Text, start: int, stop: int) -> Text:
    made = Text(str.__getitem__(text, slice(start, stop)))
    length = len(made)
    if len(text.runs) == 1:
        made.runs = ((length, text.runs[0][1]),) if length else ()
        return made
    cut: list[tuple[int, int]] = []
    first = bisect_right(text.runs, start, key=lambda r: r[0])
    for end, source in text.runs[first:]:
        if (cut and cut[-1][0] == length) or not length:
            break
        cut.append((min(end - start, length), source))
    made.runs = tuple(cut)
    return made


def join(parts: Iterable[str]) -> Text:
    """The parts one after the other, each with its sources."""
    parts = list(parts)
    made = Text("".join(parts))
    runs: list[tuple[int, int]] = []
    offset = 0
    for part in parts:
        for stop, source in runs_of(part):
            if runs and runs[-1][1] == source:
                runs[-1] = (offset + stop, source)
            else:
                runs.append((offset + stop, source))
        offset += len(part)
    made.runs = tuple(runs)
    return made


def join_any(parts: Iterable[Any]) -> Text:
    """Jinja's `~` and buffers: anything, as text."""
    return join([p if isinstance(p, str) else as_text(p) for p in parts])


def as_text(value: Any) -> str:
    """str(value); a container of texts loses where its characters came from."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | Mapping) and has_origin(value):
        return join(_repr(value))
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
    parts = Text.split(_as_origin(pattern), "%s")
    if len(parts) != len(items) + 1:
        raise TypeError("not all arguments converted, or not enough, in %")
    return join_any([parts[0], *(x for pair in zip(items, parts[1:], strict=True) for x in pair)])


def _as_origin(text: str) -> Text:
    return text if isinstance(text, Text) else Text.of(text, TEMPLATE)


def _locate(text: Text, parts: list[str]) -> list[str]:
    """The parts of a split, each found in the text from left to right."""
    found: list[str] = []
    at = 0
    for part in parts:
        at = str.index(text, part, at)
        found.append(_cut(text, at, at + len(part)))
        at += len(part)
    return found


# --- JSON ------------------------------------------------------------------------------------------------


def to_json(value: Any, *, ensure_ascii: bool, indent: Any, separators: Any, sort_keys: bool) -> str:
    """`json.dumps` of a value with texts inside; what isn't a text belongs to the key or text beside it."""
    comma, colon = separators or ((", ", ": ") if indent is None else (",", ": "))
    space = None if indent is None else (indent if isinstance(indent, str) else " " * indent)
    options = _Json(ensure_ascii, space, comma, colon, sort_keys)
    return join(options.value(value, 0, TEMPLATE))


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
