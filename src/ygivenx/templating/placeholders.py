"""Texts that a template sees only through its questions: symbolic values, as symbolic execution has them.

A `Placeholder` stands for one text of a row while a template is rendered. It isn't a str: a template can write it, put
it beside other words, and ask it something (is it empty, does it hold `</think>`?). The answer is that of the text
which it stands for, and is kept as one of the `PathConditions`. Whatever else a template does to it raises `Undecided`.
So rows of one shape whose texts answer alike are rendered alike but for the texts: what is proven of one rendering is
proven of all.

In a rendered text a placeholder is one character, half a surrogate pair, which no row's text can hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from .origins import OriginsLost
from .sandbox import measured

FIRST, MOST = 0xD800, 2048
MARK = re.compile("[\ud800-\udfff]")

MOST_PARTS = 10_000

PathCondition = tuple[int, str, tuple[Any, ...]]  # of which placeholder, what, with which arguments


class Undecided(OriginsLost):
    """What happens depends on the text that a placeholder stands for."""


def undecided(*args: Any, **kwargs: Any) -> NoReturn:
    raise Undecided


ASK: dict[str, Callable[..., bool]] = {
    "true": bool,
    "equals": str.__eq__,
    "contains": str.__contains__,
    "startswith": str.startswith,
    "endswith": str.endswith,
    "strip": lambda text, chars: text.strip(chars) == text,
    "lstrip": lambda text, chars: text.lstrip(chars) == text,
    "rstrip": lambda text, chars: text.rstrip(chars) == text,
}


class PathConditions:
    """The placeholders of one row and what a template asked them."""

    def __init__(self) -> None:
        self.placeholders: list[Placeholder] = []
        self.answers: dict[PathCondition, bool] = {}

    def placeholder(self, text: str, derived_from: tuple[int, str, str | None] | None = None) -> Placeholder:
        """A new placeholder; derived_from: (number, method, characters) of the one that was stripped to this text."""
        if len(self.placeholders) == MOST:
            raise Undecided
        self.placeholders.append(Placeholder(self, len(self.placeholders), text, derived_from))
        return self.placeholders[-1]

    def stripped(self, placeholder: Placeholder, method: str, chars: str | None) -> Placeholder:
        """The one placeholder for this placeholder's text without white space at its ends."""
        derived_from = (placeholder.number, method, chars)
        known = next((h for h in self.placeholders if h.derived_from == derived_from), None)
        return known or self.placeholder(getattr(placeholder.text, method)(chars), derived_from)

    def texts(self, given: Sequence[str]) -> list[str]:
        """The text for each placeholder in another row, whose texts for those that weren't made are `given`."""
        texts = list(given)
        for h in self.placeholders[len(given) :]:
            assert h.derived_from is not None
            of, method, chars = h.derived_from
            texts.append(getattr(texts[of], method)(chars))
        return texts

    def hold_for(self, texts: Sequence[str]) -> bool:
        """Whether these texts, one for each placeholder, would have answered as the placeholders did."""
        return all(ASK[what](texts[n], *args) == a for (n, what, args), a in self.answers.items())


class Opaque:
    """Something written that isn't looked into."""

    __slots__ = ()

    def __add__(self, other: Any) -> Any:
        return concatenated((self, other)) if _is_text(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return concatenated((other, self)) if _is_text(other) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = undecided
    __len__ = __iter__ = __getitem__ = __contains__ = __str__ = __repr__ = __format__ = undecided
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __eq__ = undecided


class Placeholder(Opaque):
    """One text; see the module."""

    __slots__ = ("conditions", "derived_from", "number", "text")

    def __init__(
        self,
        conditions: PathConditions,
        number: int,
        text: str,
        derived_from: tuple[int, str, str | None] | None,
    ) -> None:
        self.conditions, self.number, self.text, self.derived_from = conditions, number, text, derived_from

    @property
    def mark(self) -> str:
        return chr(FIRST + self.number)

    def require_other_beginning(self, rest: str) -> None:
        """Ask that this text isn't empty and doesn't begin as `rest` does; raises Undecided if it does."""
        if not self or (rest and (MARK.match(rest) or self._ask("startswith", rest[0]))):
            raise Undecided

    def _ask(self, what: str, *args: Any) -> bool:
        if not all(_is_plain(a) for a in args):
            raise Undecided
        answer = ASK[what](self.text, *args)
        self.conditions.answers[self.number, what, args] = answer
        return answer

    def __bool__(self) -> bool:
        return self._ask("true")

    def __eq__(self, other: object) -> bool:  # type: ignore[override]  # the base says None: undecided
        if other is self:
            return True
        if isinstance(other, Opaque):
            raise Undecided
        return isinstance(other, str) and self._ask("equals", other)

    __hash__ = undecided

    def __contains__(self, part: Any) -> bool:  # type: ignore[override]  # likewise
        return self._ask("contains", part)

    def startswith(self, prefix: Any) -> bool:
        return self._ask("startswith", prefix)

    def endswith(self, suffix: Any) -> bool:
        return self._ask("endswith", suffix)

    def strip(self, chars: str | None = None) -> Placeholder:
        return self._stripped("strip", chars)

    def lstrip(self, chars: str | None = None) -> Placeholder:
        return self._stripped("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> Placeholder:
        return self._stripped("rstrip", chars)

    def _stripped(self, method: str, chars: str | None) -> Placeholder:
        if self._ask(method, chars):
            return self
        if chars is not None and not chars.isspace():
            raise Undecided  # a part of the text is lost
        return self.conditions.stripped(self, method, chars)

    def split(self, sep: Any = None, maxsplit: int = -1) -> list[Placeholder]:
        self._lacks(sep)
        return [self]

    rsplit = split

    def partition(self, sep: Any) -> tuple[Placeholder, str, str]:
        self._lacks(sep)
        return self, "", ""

    def rpartition(self, sep: Any) -> tuple[str, str, Placeholder]:
        self._lacks(sep)
        return "", "", self

    def replace(self, old: Any, new: Any, count: int = -1) -> Placeholder:
        self._lacks(old)
        return self

    def _lacks(self, part: Any) -> None:
        if part is None or self._ask("contains", part):
            raise Undecided


class Words(Opaque):
    """Words of the template and placeholders beside each other."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[str | Placeholder, ...]) -> None:
        self.parts = parts

    def __bool__(self) -> bool:
        return any(isinstance(p, str) for p in self.parts) or undecided()

    __hash__ = undecided


def concatenated(parts: Iterable[Any]) -> str | Placeholder | Words:
    flat = list(_flat(parts))
    if not any(isinstance(p, Placeholder) for p in flat):
        return "".join(measured(flat))
    if len(flat) > MOST_PARTS:
        raise Undecided
    return flat[0] if len(flat) == 1 else Words(tuple(flat))


def _flat(parts: Iterable[Any]) -> Iterator[Any]:
    for part in parts:
        part = as_written(part)
        if isinstance(part, Words):
            yield from part.parts
        elif isinstance(part, Placeholder) or part:
            yield part


def as_written(value: Any) -> Any:
    """As `str` writes it; what holds a placeholder can't be looked into (its repr raises)."""
    return value if _is_text(value) else str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str | Opaque)


def _is_plain(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, tuple) and all(map(_is_plain, value)))
    )


def text_with_marks(pieces: Iterable[Any]) -> str:
    """What was written, each placeholder as its mark."""
    flat = list(_flat(pieces))
    if any(isinstance(p, str) and MARK.search(p) for p in flat):
        raise Undecided  # the template itself writes what we take for marks
    return "".join(p.mark if isinstance(p, Placeholder) else p for p in flat)
