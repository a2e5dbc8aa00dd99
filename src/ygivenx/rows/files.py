"""Raw rows of every kind of file, in order, one at a time: which kind it is, and how text files are read."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError, DataError, RowError, nearest
from .columnar import arrow_rows, hub_rows, saved_shards
from .raw import MAX_BATCH_BYTES, RawRow, Source, too_long
from .strictjson import Strict, elements, refuse_many_values

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_CELL = 64  # bytes of a short text in Python
_PACKED = (".gz", ".gzip", ".zst", ".zstd")


def open_source(name: str, split: str | None, limit: int, is_row: Callable[[list[str]], bool]) -> Source:
    """The rows of a file, a directory that `datasets` saved, or `hf:NAME[:CONFIG]`, by what it is called.

    `limit` is the longest row in bytes; `is_row` tells by its keys whether a JSON object is itself a row.
    """
    path = Path(name)
    if name.startswith("hf:"):
        return partial(hub_rows, name[3:], split)
    if path.is_dir():
        return partial(arrow_rows, saved_shards(path, split))
    if split is not None:
        raise ConfigError("only datasets have splits", where=name, fix="leave split= (--split) out")
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        fix = "what the datasets library knows by a name is written hf:NAME"
        raise DataError(f"there is no such file{nearest(path.name, beside)}", where=name, fix=fix)
    kinds: dict[str, Source] = {
        **dict.fromkeys((".jsonl", ".ndjson"), partial(_json_lines, path, limit)),
        ".json": partial(_json_rows, path, limit, is_row),
        ".csv": partial(_csv_rows, path, limit, ","),
        ".tsv": partial(_csv_rows, path, limit, "\t"),
        **dict.fromkeys((".parquet", ".arrow", ".feather"), partial(arrow_rows, [path])),
    }
    suffix = (path.with_suffix("") if path.suffix.lower() in _PACKED else path).suffix.lower()
    if suffix not in kinds:
        what = f"unknown kind of file, {suffix or 'without a suffix'}"
        raise DataError(what, where=name, fix=f"known: {', '.join(kinds)}; text also packed by gzip or zstd")
    return kinds[suffix]


def count_of_rows(name: str, limit: int | None = None) -> int | None:
    """About how many rows a file has, `limit` at most; None where that isn't known without reading them."""
    path = Path(name)
    count = None
    if path.suffix.lower() in (".jsonl", ".ndjson", ".csv", ".tsv"):
        with path.open("rb") as file:
            count = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    elif path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        count = int(pq.read_metadata(path).num_rows)
    return limit if count is None else min(count, count if limit is None else limit)


# --- text ------------------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a text file, unpacked by what it is rather than by what it is called."""
    with path.open("rb") as packed, _unpacked(packed) as stream:
        if stream.peek(2)[:2] in _UTF16:
            raise DataError("the text is UTF-16", where=str(path), fix="convert it to UTF-8")
        yield stream


def _unpacked(stream: io.BufferedReader) -> io.BufferedReader:
    import pyarrow as pa

    magic = stream.peek(4)[:4]
    if magic.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=stream))
    if magic == _ZSTD:
        return io.BufferedReader(pa.input_stream(stream, compression="zstd"))
    return stream


def _lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines with their ends, without a byte order mark; None for one of more than `limit` bytes."""
    for n in count():
        line = stream.readline(limit + 1)
        if not line:
            return
        long = len(line) > limit
        while len(line) > limit and not line.endswith(b"\n"):
            line = stream.readline(limit + 1)
        yield None if long else line if n else line.removeprefix(_BOM)


def _json_lines(path: Path, limit: int) -> Iterator[RawRow | None]:
    """A row a line; an array of rows, which other tools write under this name, all the same."""
    if _is_array_of_rows(path, limit):
        yield from _array_rows(path, limit)
        return
    strict = Strict()
    with _open(path) as stream:
        for n, line in enumerate(_lines(stream, limit), 1):
            if line is None:
                yield RawRow(f"line {n}", None, too_long(limit))
            else:
                yield _json_line(f"line {n}", line, strict) if line.strip() else None


def _json_line(place: str, line: bytes, strict: Strict) -> RawRow:
    text = ""
    try:
        text = line.decode()
        refuse_many_values(text, MAX_BATCH_BYTES)
        return RawRow(place, strict.whole(text))
    except UnicodeDecodeError as e:
        why = f"at byte {e.start + 1} of the line"
        fault = RowError(f"byte 0x{line[e.start]:02x} isn't UTF-8", reason="invalid_utf8", why=why)
        return RawRow(place, line.decode(errors="backslashreplace"), fault)
    except RowError as e:
        if e.reason == "broken_json" and not line.endswith(b"\n"):
            e = RowError("the file ends in half a row", reason="cut_off", why=e.why, fix=e.fix)
        return RawRow(place, text, e)


def _is_array_of_rows(path: Path, limit: int) -> bool:
    """Whether a file of lines is one array of objects instead. Raises DataError for one row over several lines."""
    with _open(path) as stream:
        lines = (line for line in _lines(stream, limit) if line is None or line.strip())
        first, more = next(lines, b""), next(lines, b"") != b""
    if first is None:  # a first line beyond the limit: an array of rows goes on with an object
        with _open(path) as stream:
            return bool(re.match(rb"\s*\[\s*\{", _beginning(stream)))
    start = first.strip()
    if start == b"{":
        fix = "write one row a line, as by jq -c . FILE > rows.jsonl; one array, or one object, of rows is called .json"
        raise DataError(
            "the rows are printed over several lines", where=str(path), why="a line is a row", fix=fix
        )
    if start != b"[" and not re.match(rb"\[\s*\{", start):
        return False
    # A list of messages in each line is no array of rows.
    return not (more and _json_line("", first, Strict()).fault is None)


def _array_rows(path: Path, limit: int) -> Iterator[RawRow]:
    with _open(path) as stream:
        for n, (value, fault) in enumerate(elements(stream, limit)):
            yield RawRow(f"row {n}", value, fault)


def _beginning(stream: BinaryIO) -> bytes:
    """Some bytes from the first one on that isn't space, without a byte order mark."""
    data = stream.read(1 << 16).removeprefix(_BOM).lstrip()
    while not data and (more := stream.read(1 << 20)):
        data = more.lstrip()
    return data


def _json_rows(path: Path, limit: int, is_row: Callable[[list[str]], bool]) -> Iterator[RawRow | None]:
    """A .json file: an array, an object that is a row or holds rows, or after all one row a line."""
    with _open(path) as stream:
        is_array = _beginning(stream).startswith(b"[")
    if is_array:
        yield from _array_rows(path, limit)
        return
    with _open(path) as stream:
        lines = (line for line in _lines(stream, limit) if line is None or line.strip())
        first, more = next(lines, b""), next(lines, b"") != b""
    if first and more and _json_line("", first, Strict()).fault is None:
        yield from _json_lines(path, limit)
    elif first != b"":
        for n, row in enumerate(_rows_in(_json_whole(path), is_row)):
            yield RawRow(f"row {n}", row)


def _json_whole(path: Path) -> dict[str, Any]:
    """The object of a file, which is held whole."""
    with _open(path) as stream:
        data = stream.read(MAX_BATCH_BYTES + 1)
    lines = "write one row a line (.jsonl), or an array of rows: those are read piece by piece"
    if len(data) > MAX_BATCH_BYTES:
        raise DataError(f"one object of more than {MAX_BATCH_BYTES:,} bytes", fix=lines)
    try:
        text = data.decode("utf-8-sig")
        refuse_many_values(text, 4 * MAX_BATCH_BYTES)
        whole = Strict().whole(text)
    except UnicodeDecodeError as e:
        raise DataError(f"byte 0x{data[e.start]:02x} isn't UTF-8", why=f"at byte {e.start + 1}") from None
    except RowError as e:
        fix = e.fix or "a file of one row a line is called .jsonl"
        raise DataError(e.what, why=e.why, fix=lines if e.reason == "too_long" else fix) from None
    if not isinstance(whole, dict):
        raise DataError("neither an array nor an object", fix="write an array of rows")
    return whole


def _rows_in(whole: dict[str, Any], is_row: Callable[[list[str]], bool]) -> list[Any]:
    """The rows of an object: itself, its one list of objects, or its values."""
    if is_row(list(whole)):
        return [whole]
    # {"data": [...]}: exports wrap their rows, under names of all kinds.
    lists = [v for v in whole.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
    if len(lists) == 1:
        return lists[0]
    return list(whole.values()) if all(isinstance(v, dict) for v in whole.values()) else [whole]


def _csv_rows(path: Path, limit: int, delimiter: str) -> Iterator[RawRow | None]:
    # The csv module's own limit, one for the whole process, is 128 KiB a field.
    # Never less than it was: another library in this process may have raised it.
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    with _open(path) as stream:
        text = _CsvText(stream, limit, delimiter)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = _record(reader, text)
        if header is None:
            return
        if header.fault:
            raise DataError("the header can't be read", why=str(header.fault))
        names = header.value
        if twice := [c for c, n in Counter(names).items() if n > 1]:
            raise DataError(f"the column {twice[0]!r} occurs twice")
        while record := _record(reader, text):
            yield _named(record, names)
            if record.fault and text.lost and text.more():
                why = f"{record.fault.what} at {record.place}, and a quoted cell may go on in the next line"
                fix = "mend the file, or write one row a line (.jsonl): then a broken row costs no other"
                raise DataError("the records after that can't be found", why=why, fix=fix)


def _named(record: RawRow, names: list[str]) -> RawRow | None:
    """A record with its cells by column; None for a blank line."""
    if record.fault:
        return record
    if not record.value:
        return None
    if len(record.value) != len(names):
        what = f"{len(record.value)} fields where the header has {len(names)}"
        return record._replace(fault=RowError(what, reason="wrong_field_count"))
    return record._replace(value=dict(zip(names, record.value, strict=True)))


class _CsvText:
    """Lines of a stream as the csv module wants them; `number` of them were read.

    `quoted`: a quote was seen since that was last set to False, or a line that is too long to be looked into, at which
    RowError is raised; `lost`: of such a record the csv module doesn't know the end.
    """

    def __init__(self, stream: BinaryIO, limit: int, delimiter: str) -> None:
        self._lines, self._limit, self._delimiter = _lines(stream, limit), limit, delimiter.encode()
        self.number = self.cells = 0
        self.quoted = self.lost = False

    def __iter__(self) -> _CsvText:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.quoted = self.quoted or line is None or b'"' in line
        # Each cell is an object of its own, however short it is.
        self.cells += line.count(self._delimiter) if line else 0
        if line is None or self.cells * _CELL > MAX_BATCH_BYTES:
            raise too_long(self._limit)
        return line.decode(errors="surrogateescape")

    def more(self) -> bool:
        """Whether anything but blank lines is left; reads on to it."""
        return any(line is None or line.strip() for line in self._lines)


def _record(reader: Any, text: _CsvText) -> RawRow | None:
    """The next record of a CSV file as a list of cells; None at the end."""
    start, text.quoted, text.cells = text.number, False, 0
    place = f"line {start + 1}"
    try:
        cells = next(reader)
    except StopIteration:
        return None
    except csv.Error as e:
        text.lost = text.quoted  # without a quote, the next line begins a record
        if "unexpected end" not in str(e):
            return RawRow(place, None, RowError("not a record", reason="broken_csv", why=str(e)))
        why = f"a quoted cell is open through {text.number - start} lines, to the end"
        return RawRow(place, None, RowError("the file ends in half a record", reason="cut_off", why=why))
    except RowError as e:
        text.lost = True
        return RawRow(place, None, e)
    for n, cell in enumerate(cells, 1):
        try:
            cell.isascii() or cell.encode()
        except UnicodeEncodeError:
            shown = [c.encode(errors="surrogateescape").decode(errors="backslashreplace") for c in cells]
            return RawRow(place, shown, RowError(f"cell {n} isn't UTF-8", reason="invalid_utf8"))
    return RawRow(place, cells)
