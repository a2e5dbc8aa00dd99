"""Text that knows, for each character, which field of a row it came from.

`Text` is a `str` that carries runs of sources through everything that chat templates do to strings: slicing,
strip, split, partition, replace, join, case, `+`, `*`. Source 0 is the template itself. A method that
can't say where its characters come from raises `OriginsLost`: a wrong origin is worse than none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index
from typing import Any, NoReturn, SupportsIndex

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
        result = Text(text)
        result.runs = ((len(text), source),) if text else ()
        return result

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
        return join_texts([_cut(self, i, i + 1) for i in range(start, stop, step)])

    def __iter__(self) -> Iterator[Text]:
        return (_cut(self, i, i + 1) for i in range(len(self)))

    def __add__(self, other: str) -> Text:
        return join_texts((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Text:
        return join_texts((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Text:
        return join_texts([self] * times.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> NoReturn:  # the sandbox has `percent` for it
        raise OriginsLost

    __rmod__ = __mod__

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
        # From the right the parts are found as from the left in a mirror: "a--b---c" by "--" gives other cuts each
        # way.
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
            # "" stands between all characters: what is put there has no one place to come from.
            return self.made_into(str.replace(self, old, new, count))
        pieces: list[str] = []
        at, left = 0, count.__index__()
        while left and (found := str.find(self, old, at)) >= 0:
            pieces += [_cut(self, at, found), new]
            at, left = found + len(old), left - 1
        return join_texts([*pieces, _cut(self, at, len(self))]) if pieces else self

    def join(self, parts: Iterable[str], /) -> Text:
        pieces: list[str] = []
        for i, part in enumerate(parts):
            if not isinstance(part, str):
                raise TypeError(f"sequence item {i}: expected str instance, {type(part).__name__} found")
            pieces += [self, part] if i else [part]
        return join_texts(pieces)

    def made_into(self, result: str) -> Text:
        """`result` was made of this text alone: right where it has one source or kept its length."""
        result = Text(result)
        if len(self.runs) <= 1:
            result.runs = ((len(result), self.runs[0][1] if self.runs else TEMPLATE),) if result else ()
        # As upper-casing does, character by character; where "ß" becomes "SS" nobody knows which characters moved.
        elif len(result) == len(self):
            result.runs = self.runs
        else:
            raise OriginsLost
        return result

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> Text:
        return join_texts((self, fill * (width.__index__() - len(self))))

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> Text:
        return join_texts((fill * (width.__index__() - len(self)), self))


def _by_character(name: str) -> Any:
    method = getattr(str, name)
    return lambda self, *args: self.made_into(method(self, *args))


for _name in "upper lower title capitalize swapcase casefold expandtabs zfill center translate".split():
    setattr(Text, _name, _by_character(_name))


def text_with(text: str, runs: Runs) -> Text:
    """A text of known runs."""
    result = Text(text)
    result.runs = runs
    return result


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


def _cut(text: Text, start: int, stop: int) -> Text:
    result = Text(str.__getitem__(text, slice(start, stop)))
    length = len(result)
    if len(text.runs) == 1:
        result.runs = ((length, text.runs[0][1]),) if length else ()
        return result
    cut: list[tuple[int, int]] = []
    first = bisect_right(text.runs, start, key=lambda r: r[0])
    for end, source in text.runs[first:]:
        if (cut and cut[-1][0] == length) or not length:
            break
        cut.append((min(end - start, length), source))
    result.runs = tuple(cut)
    return result


def join_texts(parts: Iterable[str]) -> Text:
    """The parts one after the other, each with its sources."""
    parts = list(parts)
    result = Text("".join(parts))
    runs: list[tuple[int, int]] = []
    offset = 0
    for part in parts:
        for stop, source in runs_of(part):
            if runs and runs[-1][1] == source:
                runs[-1] = (offset + stop, source)
            else:
                runs.append((offset + stop, source))
        offset += len(part)
    result.runs = tuple(runs)
    return result


def _locate(text: Text, parts: list[str]) -> list[str]:
    """The parts of a split, each found in the text from left to right."""
    found: list[str] = []
    at = 0
    for part in parts:
        at = str.index(text, part, at)
        found.append(_cut(text, at, at + len(part)))
        at += len(part)
    return found
