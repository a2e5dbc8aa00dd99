"""JSON as the standard has it: what Python's module forgives (NaN, doubled keys) is an error with a reason."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from .errors import DataError, RowError

_CHUNK = 1 << 20
_SPACE = " \t\n\r"


class Strict:
    """A decoder that notes a broken rule and reads on, so that the end of a value is known all the same."""

    def __init__(self) -> None:
        self._fault: RowError | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            why = "only one of the values would be kept"
            self._fault = RowError(f"the key {key!a} occurs twice", reason="duplicate_key", why=why)
        return made

    def _constant(self, name: str) -> None:
        self._fault = RowError(f"{name} is no JSON number", reason="not_a_number")

    def value(self, text: str, start: int = 0) -> tuple[Any, int, RowError | None]:
        """(value, index after it, fault or None); raises RowError `broken_json` or `too_deep` if it has no end."""
        self._fault = None
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError:
            raise RowError("nested too deeply", reason="too_deep") from None
        except json.JSONDecodeError as e:
            why = f"{e.msg} at character {e.pos - start + 1}"
            raise RowError("not JSON", reason="broken_json", why=why) from None
        except ValueError as e:  # an integer of thousands of digits
            raise RowError("not JSON", reason="broken_json", why=str(e)) from None
        return value, end, self._fault

    def whole(self, text: str) -> Any:
        """The one value that `text` is; raises RowError."""
        value, end, fault = self.value(text, len(text) - len(text.lstrip(_SPACE)))
        if text[end:].strip(_SPACE):
            raise RowError(
                "not JSON", reason="broken_json", why=f"the value ends at character {end}, the text doesn't"
            )
        if fault:
            raise fault
        return value


class _Window:
    """The text ahead in a stream; holds what is being decoded and not more than twice that."""

    def __init__(self, stream: BinaryIO) -> None:
        self.text, self.at, self.ended = "", 0, False
        self._read = stream.read
        # Bytes that aren't UTF-8 become lone surrogates, and so the fault of the element that has them.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode

    def grow(self) -> None:
        data = self._read(max(_CHUNK, len(self.text) - self.at))
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self._decode(data, self.ended), 0

    def next(self) -> str:
        """The next character that isn't space, unread; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()


def elements(stream: BinaryIO, limit: int) -> Iterator[tuple[Any, RowError | None]]:
    """(value, fault) for each element of a JSON array, read piece by piece.

    An array that ends early gives a last (text, `cut_off`). Raises DataError where the array itself is broken or
    an element is longer than `limit` characters: where the next element begins is then anybody's guess.
    """
    window, strict = _Window(stream), Strict()
    window.next()
    window.at += 1  # the bracket
    done = window.next() == "]"
    while not done:
        try:
            value, window.at, fault = _element(window, strict, limit)
        except RowError as e:
            if not window.ended or e.reason != "broken_json":
                raise _broken(e) from None
            yield window.text[window.at :], _cut_off(e)
            return
        yield value, fault
        separator = window.next()
        if separator == "":
            yield "", _cut_off(None)
            return
        if separator not in ",]":
            raise _broken(RowError(f"{separator!a} where a comma belongs", reason="broken_json"))
        window.at += 1
        done = separator == "]"
    if window.next():
        raise _broken(RowError("text after the array", reason="broken_json"))


def _element(window: _Window, strict: Strict, limit: int) -> tuple[Any, int, RowError | None]:
    window.next()
    while True:
        try:
            value, end, fault = strict.value(window.text, window.at)
            if end < len(window.text) or window.ended:  # else it may go on, as numbers do
                return value, end, fault or _invalid_utf8(window.text[window.at : end])
        except RowError as e:
            if window.ended or e.reason == "too_deep":
                raise
        if len(window.text) - window.at > limit:
            raise RowError(f"no end within {limit:,} characters", reason="too_long")
        window.grow()


def _invalid_utf8(text: str) -> RowError | None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as e:
        byte = ord(text[e.start]) - 0xDC00
        return RowError(
            f"byte 0x{byte:02x} isn't UTF-8", reason="invalid_utf8", why=f"at character {e.start + 1}"
        )
    return None


def _cut_off(e: RowError | None) -> RowError:
    return RowError("the file ends before its array does", reason="cut_off", why=e.why if e else "")


def _broken(e: RowError) -> DataError:
    why = "; ".join(w for w in (e.what, e.why) if w)
    fix = "mend the file, or write one row a line (.jsonl): then a broken row costs no other"
    return DataError(
        "the array breaks off in the middle, and the rows after that can't be found", why=why, fix=fix
    )
