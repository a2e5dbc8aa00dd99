"""Rows in: a stream of rows from a file, each accepted as a noun or rejected with its place and reason.

JSON Lines, JSON, CSV, TSV (plain, gzip or zstd), Parquet, Arrow (file or stream), a directory that
`datasets` saved, and `hf:NAME` for what the datasets library finds. A row ends in exactly one of two places:
accepted + quarantined = read. Blank lines are no rows and are counted apart. Memory holds a row or a batch of
rows, not the file (only a .json file that is one object is parsed whole).

Reasons of `Rejected`:
- the file: invalid_utf8, broken_json, cut_off (half a row at the end), not_a_number (NaN, Infinity),
  duplicate_key, too_deep, too_long, broken_csv, wrong_field_count, unreadable_value (Arrow);
- the row: not_an_object, missing_column, wrong_type, lone_surrogate, conflict, missing_field;
- the row's kind: judged_row (KTO's label), not_text (images, audio, video);
- messages: empty_messages, missing_role, unknown_role, null_content, unknown_part, part_order, bad_weight, bad_span;
- token ids: bad_token, wrong_length, empty_tokens, packed_row.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, RowError
from ..sequence import Rejected
from .files import open_source
from .formats import Conversation, Format, Noun, Pair, Preference, TokenRow, normalise, recognise
from .raw import MAX_ROW_BYTES, RawRow, Source

__all__ = ["Conversation", "Pair", "Preference", "Reader", "Row", "TokenRow", "normalise", "read"]

_PEEK = 20  # rows whose columns decide the format


@dataclass(frozen=True, slots=True)
class Row:
    """An accepted row: `index` counts all rows read from 0, `where` says file, row and line (from 1), if it has one."""

    index: int
    where: str
    value: Noun
    raw: Mapping[str, Any]


def read(
    path: str | Path,
    *,
    fmt: str | None = None,
    x: str | None = None,
    y: str | None = None,
    as_text: bool = False,
    split: str | None = None,
    limit: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    roles: Iterable[str] = (),
) -> Reader:
    """A Reader over the rows of a file, a saved dataset's directory or `hf:NAME[:CONFIG]`.

    The columns of the first rows decide the format, unless `fmt` names it or `x` and `y` name two text
    columns (a user's and an assistant's message; with `as_text` a Pair of texts as the model reads them).
    `roles`: what messages may have as a role beside the known ones.
    `split` picks one of a dataset's splits. `limit` stops after so many rows, accepted or not. A line longer
    than `max_row_bytes` is quarantined without being held.

    Raises DataError if the file can't be read or its columns fit no format or several, here and, where a file
    turns out to be broken further on, while iterating; MissingExtra for `hf:` without the datasets library;
    ConfigError for arguments that contradict each other.
    """
    if limit is not None and limit < 0:
        raise ConfigError(f"limit is {limit}", fix="give a number of rows, or None for all")
    format_of = partial(recognise, fmt=fmt, x=x, y=y, as_text=as_text, roles=roles)
    source = open_source(str(path), split, max_row_bytes, partial(_fits, format_of))
    return Reader(str(path), partial(_guarded, source, str(path)), format_of, limit)


class Reader:
    """Iterate over it for `Row` and `Rejected`, in the file's order; each iteration reads anew.

    format: the recognised format and its columns, in words. accepted, quarantined, read, blank: counts so far;
    reasons: how many rows were quarantined for which reason.
    """

    def __init__(
        self, name: str, source: Source, format_of: Callable[[list[str]], Format], limit: int | None
    ) -> None:
        self.name, self._source, self._limit = name, source, limit
        self._convert: Format | None = None
        self.format = "unknown (no row is an object)"
        self._reset()
        columns = _columns(source())
        if columns:
            try:
                self._convert = format_of(columns)
            except DataError as e:
                e.where = name
                raise
            self.format = self._convert.sentence(columns)

    def _reset(self) -> None:
        self.accepted, self.blank, self.reasons = 0, 0, Counter[str]()

    @property
    def quarantined(self) -> int:
        """How many rows were rejected."""
        return self.reasons.total()

    @property
    def read(self) -> int:
        """How many rows were read: accepted + quarantined."""
        return self.accepted + self.quarantined

    def __iter__(self) -> Iterator[Row | Rejected]:
        self._reset()
        if self._limit == 0:
            return
        for raw in self._source():
            if raw is None:
                self.blank += 1
                continue
            row = self._judge(raw)
            if isinstance(row, Row):
                self.accepted += 1
            else:
                self.reasons[row.reason] += 1
            yield row
            if self.read == self._limit:
                return

    def _judge(self, raw: RawRow) -> Row | Rejected:
        row = f"row {self.read}"
        # A line of the file, for an editor; Arrow has none, and its place is the row again.
        where = f"{self.name}, {row}" + (f" ({raw.place})" if raw.place != row else "")
        try:
            if raw.fault:
                raise raw.fault
            if self._convert is None or not isinstance(raw.value, Mapping):
                raise _no_object(raw.value)
            return Row(self.read, where, self._convert(raw.value), raw.value)
        except RowError as e:
            e.where = f"{where}, {e.field}" if e.field else where
            return Rejected(raw.value, e.reason, e.where, str(e))

    def __str__(self) -> str:
        counts = f"{self.accepted:,} accepted + {self.quarantined:,} quarantined = {self.read:,} read"
        return f"{self.name}: {self.format}; {counts}"


def _no_object(value: Any) -> RowError:
    """A row without columns; a bare list of messages lacks but its name."""
    is_chat = isinstance(value, list) and any(
        isinstance(m, Mapping) and m.keys() & {"role", "from"} for m in value
    )
    fix = 'write {"messages": [...]}' if is_chat else ""
    return RowError(f"the row is {type(value).__name__}, not an object", reason="not_an_object", fix=fix)


def _fits(format_of: Callable[[list[str]], Format], columns: list[str]) -> bool:
    try:
        format_of(columns)
    except DataError:
        return False
    return True


def _columns(rows: Iterable[RawRow | None]) -> list[str]:
    """The columns of the first rows together, read on until one of them is an object."""
    columns: dict[str, None] = {}
    for i, raw in enumerate(rows, 1):
        if raw is not None and isinstance(raw.value, Mapping):
            columns |= dict.fromkeys(map(str, raw.value))
        # Files of several kinds of rows have columns that the first row lacks.
        if columns and i >= _PEEK:
            break
    return list(columns)


def _guarded(source: Source, where: str) -> Iterator[RawRow | None]:
    """A source's rows; what libraries raise about a file becomes a DataError that says how far they got."""
    import pyarrow as pa

    last = "at the beginning"
    try:
        for raw in source():
            yield raw
            last = f"after {raw.place}" if raw else last
    except DataError as e:
        e.where = e.where or f"{where}, {last}"
        raise
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as e:
        raise DataError("the file can't be read on", where=f"{where}, {last}", why=str(e)) from e
