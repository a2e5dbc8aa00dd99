"""JSON as the standard has it: what Python's module forgives (NaN, a key twice) is an error with a reason."""

from __future__ import annotations

import codecs
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..errors import DataError, RowError
from .raw import MAX_BATCH_BYTES

_CHUNK = 1 << 20
_SPACE = " \t\n\r"
_SPACES = re.compile(r"[ \t\n\r]*")
# Bytes that a value takes in Python beside its text, by the character that it begins with or follows.
_COSTS = {"[": 64, "{": 200, ",": 64}
_TRAILING_COMMA = re.compile(r",\s*([}\]]|$)")
_SINGLE_QUOTES = re.compile(r"[{\[,:]\s*'")


class Strict:
    """A decoder that notes a broken rule and reads on, so that the end of a value is known all the same."""

    def __init__(self) -> None:
        self._fault: RowError | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                why = "only one of its values would be kept"
                self._fault = RowError(f"the key {key!a} occurs twice", reason="duplicate_key", why=why)
            result[key] = value
        return result

    def _constant(self, name: str) -> None:
        self._fault = RowError(f"{name} is no JSON number", reason="not_a_number")

    def _float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            why = f"more than {sys.float_info.max:.1e}"
            self._fault = RowError(f"{digits:.40} is too large a number", reason="not_a_number", why=why)
        return number

    def value(self, text: str, start: int = 0) -> tuple[Any, int, RowError | None]:
        """(value, index after it, fault or None).

        Raises json.JSONDecodeError where no value ends, RowError where Python can't hold it.
        """
        self._fault = None
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except RecursionError:
            raise RowError("nested too deeply", reason="too_deep") from None
        except ValueError as e:
            raise RowError("a number of too many digits", reason="not_a_number", why=str(e)) from None
        return value, end, self._fault

    def whole(self, text: str) -> Any:
        """The one value that `text` is; raises RowError."""
        try:
            value, end, fault = self.value(text, _after_space(text, 0))
        except json.JSONDecodeError as e:
            why = f"{e.msg.removesuffix(' at')} at character {e.pos + 1}"
            raise RowError("not JSON", reason="broken_json", why=why, fix=mending(text, e.pos)) from None
        if (more := _SPACES.match(text, end)) and more.end() < len(text):
            why = f"more text after character {end}"
            raise RowError("not JSON", reason="broken_json", why=why, fix=mending(text, more.end()))
        # Broken rules come last: a text that is no JSON at all says more about what happened.
        if fault:
            raise fault
        return value


def _after_space(text: str, at: int) -> int:
    """Where the next character that isn't space stands, or the end."""
    found = _SPACES.match(text, at)
    return found.end() if found else at


def mending(text: str, at: int) -> str:
    """What to do about a text that isn't JSON at this character, by what it is instead; "" where that isn't known."""
    # What explains a mistake stands close to it; in a whole file a quote somewhere would explain anything.
    around = text[max(at - 40, 0) : at + 40]
    if "\0" in around:
        return "a file that was torn, as by a loss of power, holds blocks of NUL: write it again"
    if _SINGLE_QUOTES.search(around) or around.lstrip().startswith("'"):
        return "single quotes are Python's: write rows by json.dumps, not by str or repr"
    # In an array that is read piece by piece, the comma stands before the text.
    begins_closed = text[at : at + 1] == "]" and not text[:at].strip(_SPACE)
    if (
        _TRAILING_COMMA.search(text[max(at - 40, 0) : at + 1])
        or text[at:].strip(_SPACE) == ","
        or begins_closed
    ):
        return "leave the comma after the last item out; a row of .jsonl ends without one"
    if text[at:].lstrip().startswith("{"):
        return "two rows in one line: write one row a line"
    return ""


def refuse_many_values(text: str, limit: int) -> None:
    """Raise RowError for a text whose values would take more than `limit` bytes: `[],[],…` grows by 40 times."""
    # Nearly all texts pass here, without a count of their characters.
    if len(text) * max(_COSTS.values()) <= limit:
        return
    size = len(text) + sum(cost * text.count(character) for character, cost in _COSTS.items())
    if size > limit:
        what = f"{len(text):,} characters of JSON that take about {size:,} bytes when read"
        raise RowError(
            what, reason="too_long", why=f"what is read at a time may take {limit:,}", fix="split the row"
        )


class _Window:
    """The text ahead in a stream; holds the value that is being decoded and not much more."""

    def __init__(self, stream: BinaryIO) -> None:
        self.text, self.at, self.ended = "", 0, False
        self._read = stream.read
        # Bytes that aren't UTF-8 become lone surrogates, and so a fault of the element that has them.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode

    def grow(self) -> None:
        """Drop what is behind, read as much again as lies ahead: a long value is tried log(length) times."""
        # Doubling: a value of n characters is decoded anew log(n) times, and costs 2·n in all.
        data = self._read(max(_CHUNK, len(self.text) - self.at))
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self._decode(data, self.ended), 0

    def next(self) -> str:
        """The next character that isn't space, which stays ahead; "" at the end."""
        while True:
            self.at = _after_space(self.text, self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()


def elements(stream: BinaryIO, limit: int) -> Iterator[tuple[Any, RowError | None]]:
    """(value, fault) for each element of a JSON array, read piece by piece.

    Where the file ends before its array does, the rest is a last (text, `cut_off`). Raises DataError where
    the array is broken otherwise, or an element is longer than `limit` characters: where the next one begins
    would be a guess.
    """
    window, strict = _Window(stream), Strict()
    window.next()
    window.at += 1  # the bracket
    closed = window.next() == "]"
    window.at += closed
    while not closed:
        try:
            value, window.at, fault = _element(window, strict, limit)
        except json.JSONDecodeError as e:
            if not _is_cut_off(e):
                raise _broken(f"{e.msg}: {e.doc[e.pos : e.pos + 40]!a}", mending(e.doc, e.pos)) from None
            yield window.text[window.at :], _cut_off()
            return
        yield value, fault
        separator = window.next()
        if separator == "":
            yield "", _cut_off()
            return
        if separator not in ",]":
            raise _broken(f"{separator!a} where a comma belongs")
        window.at += 1
        closed = separator == "]"
    if window.next():
        raise _broken("there is more text after the array")


def _element(window: _Window, strict: Strict, limit: int) -> tuple[Any, int, RowError | None]:
    """The next element, its end and its fault; reads on until it is whole."""
    window.next()
    while True:
        try:
            refuse_many_values(window.text, MAX_BATCH_BYTES)
            value, end, fault = strict.value(window.text, window.at)
            if end < len(window.text) or window.ended:  # else it may go on, as numbers do
                return value, end, fault or _invalid_utf8(window.text[window.at : end])
        except RowError as e:
            raise _broken(f"{e.what} {e.why}".strip()) from None
        except json.JSONDecodeError:
            if window.ended:
                raise
        if len(window.text) - window.at > limit:
            raise _broken(f"an element is longer than {limit:,} characters")
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


def _is_cut_off(e: json.JSONDecodeError) -> bool:
    """Whether the last token of a whole file is where decoding stopped: more text might have mended it."""
    rest = e.doc[e.pos :].strip(_SPACE)
    # A token that is cut short, such as "-Infin", is shorter than the longest that has no end of its own.
    in_token = len(rest) < len("-Infinity") or e.msg.startswith("Unterminated")
    return not rest or (in_token and not rest.endswith("]"))


def _cut_off() -> RowError:
    return RowError("the file ends before its array does", reason="cut_off")


def _broken(why: str, fix: str = "") -> DataError:
    fix = fix or "mend the file, or write one row a line (.jsonl): then a broken row costs no other"
    return DataError("the array is broken, and the rows after that can't be found", why=why, fix=fix)
