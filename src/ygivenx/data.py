"""Rows in: a stream of rows from a file, each accepted as a noun or rejected with its place and reason.

JSON Lines, JSON, CSV, TSV (plain, gzip or zstd), Parquet, Arrow (file or stream), a directory that
`datasets` saved, and `hf:NAME` for what the datasets library finds. Every row read ends in exactly one of two
places, so accepted + quarantined = read; blank lines are no rows and are counted apart. Memory holds a row or a
batch of rows, not the file (but a .json file that is one object is parsed whole).

Reasons of `Rejected`, besides those of `formats`: invalid_utf8, broken_json, cut_off (half a row at the end of
the file), not_a_number (NaN, Infinity), duplicate_key, too_deep, too_long, not_an_object, broken_csv,
wrong_field_count, unreadable_value (Arrow).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .errors import ConfigError, DataError, MissingExtra, RowError, nearest
from .formats import Conversation, Format, Pair, normalise, recognise
from .sequence import Rejected
from .strictjson import Strict, elements

__all__ = ["Conversation", "Pair", "Reader", "Row", "normalise", "read"]

MAX_ROW_BYTES = 64 << 20  # a longer line is skipped piece by piece, never held
_PEEK = 20  # rows whose columns decide the format
_BATCH = 256  # rows of a columnar file that are Python objects at a time


@dataclass(frozen=True, slots=True)
class Row:
    """An accepted row: `index` counts all rows read from 0, `where` says file and line or row (from 1)."""

    index: int
    where: str
    value: Conversation | Pair
    raw: Mapping[str, Any]


class _Raw(NamedTuple):
    """What a file gives before its meaning is known; None in its stead is a blank line."""

    place: str
    value: Any
    fault: RowError | None = None


_Source = Callable[[], Iterator[_Raw | None]]


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
) -> Reader:
    """A Reader over the rows of a file, a saved dataset's directory or `hf:NAME[:CONFIG]`.

    The columns of the first rows decide the format, unless `fmt` names it or `x` and `y` name two text columns
    (a user's and an assistant's message; with `as_text` a Pair of texts as the model reads them). `split` picks
    one of a dataset's splits. `limit` stops after so many rows, accepted or not.

    Raises DataError if the file can't be read or its columns fit no format or several; MissingExtra for `hf:`
    without the datasets library; ConfigError for arguments that contradict each other.
    """
    if limit is not None and limit < 0:
        raise ConfigError(f"limit is {limit}", fix="give a number of rows, or None for all")
    fits = partial(recognise, fmt=fmt, x=x, y=y, as_text=as_text)
    source = _source(str(path), split, max_row_bytes, fits)
    return Reader(str(path), partial(_guarded, source, str(path)), fits, limit)


class Reader:
    """Iterate over it for `Row` and `Rejected`, in the file's order; each iteration reads anew.

    format: the recognised format, aloud. read, accepted, quarantined, blank: counts of the iteration so far;
    reasons: how many rows were quarantined for which reason.
    """

    def __init__(
        self, name: str, source: _Source, fits: Callable[[list[str]], Format], limit: int | None
    ) -> None:
        self.name, self._source, self._limit = name, source, limit
        self._start()
        columns = _columns(source())
        self._convert: Format | None = None
        self.format = "unknown (no row is an object)"
        if columns:
            try:
                self._convert = fits(columns)
            except DataError as e:
                e.where = name
                raise
            self.format = self._convert.sentence(columns)

    def _start(self) -> None:
        self.accepted, self.blank, self.reasons = 0, 0, Counter[str]()

    @property
    def quarantined(self) -> int:
        return self.reasons.total()

    @property
    def read(self) -> int:
        return self.accepted + self.quarantined

    def __iter__(self) -> Iterator[Row | Rejected]:
        self._start()
        rows = self._source()
        while self._limit is None or self.read < self._limit:
            try:
                raw = next(rows)
            except StopIteration:
                return
            if raw is None:
                self.blank += 1
                continue
            row = self._judge(raw)
            if isinstance(row, Row):
                self.accepted += 1
            else:
                self.reasons[row.reason] += 1
            yield row

    def _judge(self, raw: _Raw) -> Row | Rejected:
        where = f"{self.name}, {raw.place}"
        try:
            if raw.fault:
                raise raw.fault
            if self._convert is None or not isinstance(raw.value, Mapping):
                raise RowError(
                    f"the row is {type(raw.value).__name__}, not an object", reason="not_an_object"
                )
            return Row(self.read, where, self._convert(raw.value), raw.value)
        except RowError as e:
            e.where = f"{where}, {e.field}" if e.field else where
            return Rejected(raw.value, e.reason, e.where, str(e))

    def __str__(self) -> str:
        return f"{self.name}: {self.format}; {self.accepted:,} accepted + {self.quarantined:,} quarantined = {self.read:,} read"


def _columns(rows: Iterable[_Raw | None]) -> list[str]:
    """The columns of the first rows together, read on until one of them is an object."""
    columns: dict[str, None] = {}
    for i, raw in enumerate(rows):
        if raw is not None and isinstance(raw.value, Mapping):
            columns |= dict.fromkeys(map(str, raw.value))
        if columns and i + 1 >= _PEEK:
            break
    return list(columns)


def _guarded(source: _Source, where: str) -> Iterator[_Raw | None]:
    """The rows of a source, with what the libraries underneath raise as a DataError that says how far it got."""
    import pyarrow as pa

    last = "the beginning"
    try:
        for raw in source():
            yield raw
            last = raw.place if raw else last
    except DataError as e:
        e.where = e.where or f"{where}, after {last}"
        raise
    except (OSError, EOFError, zlib.error, pa.ArrowException) as e:
        raise DataError("can't be read on", where=f"{where}, after {last}", why=str(e)) from e


# --- which kind of file ----------------------------------------------------------------------------------

_ZSTD, _GZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"
_SUFFIXES = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "feather")


def _source(name: str, split: str | None, limit: int, fits: Callable[[list[str]], Format]) -> _Source:
    path = Path(name)
    if name.startswith("hf:"):
        return partial(_hub, name[3:], split)
    if path.is_dir():
        return partial(_arrow_rows, [_shard(p) for p in _saved_shards(path, split)])
    if split is not None:
        raise ConfigError("only datasets have splits", where=name, fix="leave split= out")
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        what = f"there is no such file{nearest(path.name, beside)}"
        raise DataError(what, where=name, fix="for a name that the datasets library knows, write hf:NAME")
    suffixes = [s[1:].lower() for s in path.suffixes]
    suffix = next((s for s in reversed(suffixes) if s in _SUFFIXES), None)
    if suffix is None:
        raise DataError(
            "unknown kind of file",
            where=name,
            fix=f"known: .{', .'.join(_SUFFIXES)}, and .gz or .zst of them",
        )
    if suffix in ("parquet", "arrow", "feather"):
        return partial(_arrow_rows, [_shard(path)])
    if suffix in ("csv", "tsv"):
        return partial(_csv_rows, path, "," if suffix == "csv" else "\t", limit)
    return partial(_json_lines if suffix != "json" else partial(_json_rows, fits=fits), path, limit)


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked by what it is, not by what it is called. UTF-16 is refused."""
    with path.open("rb") as f:
        magic = f.read(4)
    stream: Any
    if magic.startswith(_GZIP):
        stream = gzip.open(path)
    elif magic == _ZSTD:
        import pyarrow as pa

        stream = io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    else:
        stream = path.open("rb")
    if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        stream.close()
        raise DataError("the text is UTF-16", where=str(path), fix="convert it to UTF-8")
    return stream


# --- text files ------------------------------------------------------------------------------------------


def _lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines with their ends, without a byte order mark; None for one of more than `limit` bytes."""
    for n in count():
        line = stream.readline(limit + 1)
        if not line:
            return
        long = len(line) > limit
        while len(line) > limit and not line.endswith(b"\n"):
            line = stream.readline(limit + 1)
        yield None if long else line if n else line.removeprefix(b"\xef\xbb\xbf")


def _json_lines(path: Path, limit: int) -> Iterator[_Raw | None]:
    strict = Strict()
    with _open(path) as stream:
        for n, line in enumerate(_lines(stream, limit), 1):
            if line is None or line.strip():
                yield _json_line(f"line {n}", line, strict, limit)
            else:
                yield None


def _json_line(place: str, line: bytes | None, strict: Strict, limit: int) -> _Raw:
    if line is None:
        return _Raw(
            place, None, RowError(f"longer than {limit:,} bytes", reason="too_long", fix="max_row_bytes=")
        )
    try:
        text = line.decode()
        return _Raw(place, strict.whole(text))
    except UnicodeDecodeError as e:
        fault = RowError(
            f"byte 0x{line[e.start]:02x} isn't UTF-8", reason="invalid_utf8", why=f"at byte {e.start + 1}"
        )
        return _Raw(place, line.decode(errors="backslashreplace"), fault)
    except RowError as e:
        if e.reason == "broken_json" and not line.endswith(b"\n"):
            e = RowError("the file ends in half a row", reason="cut_off", why=e.why)
        return _Raw(place, text, e)


def _json_rows(path: Path, limit: int, fits: Callable[[list[str]], Format]) -> Iterator[_Raw | None]:
    """A .json file: an array, an object that holds rows or is one, or after all one row a line."""
    with _open(path) as stream:
        lines = (line for line in _lines(stream, limit) if line is None or line.strip())
        first, more = next(lines, b""), next(lines, b"") != b""
    if first == b"":
        return
    start = (first or b"").lstrip()[:1]
    if start == b"[" or first is None:
        with _open(path) as stream:
            for n, (value, fault) in enumerate(elements(stream, limit), 1):
                yield _Raw(f"row {n}", value, fault)
    elif start == b"{" and more and _json_line("", first, Strict(), limit).fault is None:
        yield from _json_lines(path, limit)
    else:
        yield from _object_rows(path, fits)


def _object_rows(path: Path, fits: Callable[[list[str]], Format]) -> Iterator[_Raw]:
    with _open(path) as stream:
        data = stream.read()
    try:
        whole = Strict().whole(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise DataError(f"byte 0x{data[e.start]:02x} isn't UTF-8", why=f"at byte {e.start + 1}") from None
    except RowError as e:
        raise DataError(e.what, why=e.why, fix="a file of one row a line is called .jsonl") from None
    if not isinstance(whole, dict):
        raise DataError("neither an array nor an object", fix="write an array of rows")
    for n, row in enumerate(_rows_in(whole, fits), 1):
        yield _Raw(f"row {n}", row)


def _rows_in(whole: dict[str, Any], fits: Callable[[list[str]], Format]) -> list[Any]:
    """The rows of an object: itself, its one list of objects, or its values."""
    try:
        fits(list(whole))
        return [whole]
    except DataError:
        lists = [
            v for v in whole.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)
        ]
        if len(lists) == 1:
            return lists[0]
        return list(whole.values()) if all(isinstance(v, dict) for v in whole.values()) else [whole]


def _csv_rows(path: Path, delimiter: str, limit: int) -> Iterator[_Raw | None]:
    # The csv module's own limit, of the whole process, is 128 KiB a field.
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    with _open(path) as stream:
        text = _Text(stream, limit)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = _record(reader, text)
        if header is None or header.fault:
            if header is None:
                return
            raise DataError("the header can't be read", where=str(path), why=str(header.fault))
        names = header.value
        if twice := [c for c, n in Counter(names).items() if n > 1]:
            raise DataError(f"the column {twice[0]!r} occurs twice", where=str(path))
        while record := _record(reader, text):
            if record.value == [] and not record.fault:
                yield None
            elif not record.fault and len(record.value) != len(names):
                what = f"{len(record.value)} fields where the header has {len(names)}"
                yield record._replace(fault=RowError(what, reason="wrong_field_count"))
            else:
                yield (
                    record
                    if record.fault
                    else record._replace(value=dict(zip(names, record.value, strict=True)))
                )


class _Text:
    """Lines of a stream as the csv module wants them; `long` says that one was left out for its length."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._lines, self.limit, self.long = _lines(stream, limit), limit, False

    def __iter__(self) -> _Text:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.long |= line is None
        return "\n" if line is None else line.decode(errors="surrogateescape")


def _record(reader: Any, text: _Text) -> _Raw | None:
    """The next record of a CSV file (a list of cells), None at the end."""
    place, text.long = f"line {reader.line_num + 1}", False
    try:
        cells = next(reader)
    except StopIteration:
        return None
    except csv.Error as e:
        reason = "cut_off" if "unexpected end" in str(e) else "broken_csv"
        return _Raw(place, None, RowError("not a record", reason=reason, why=str(e)))
    if text.long:
        return _Raw(
            place,
            None,
            RowError(f"longer than {text.limit:,} bytes", reason="too_long", fix="max_row_bytes="),
        )
    for n, cell in enumerate(cells, 1):
        try:
            cell.isascii() or cell.encode()
        except UnicodeEncodeError:
            return _Raw(place, cells, RowError(f"cell {n} isn't UTF-8", reason="invalid_utf8"))
    return _Raw(place, cells)


# --- columnar files and datasets -------------------------------------------------------------------------


def _arrow_rows(shards: Iterable[Callable[[], Iterator[Any]]]) -> Iterator[_Raw]:
    numbers = count(1)
    for shard in shards:
        for batch in shard():
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise DataError(f"a column occurs twice among {', '.join(names)}")
            for start in range(0, batch.num_rows, _BATCH):
                for value, fault in _values(batch.slice(start, _BATCH)):
                    yield _Raw(f"row {next(numbers)}", value, fault)


def _values(part: Any) -> Iterator[tuple[Any, RowError | None]]:
    """Rows of a record batch as dicts; one that has no Python value (text that isn't UTF-8, say) with its fault."""
    import pyarrow as pa

    try:
        for row in part.to_pylist():
            yield row, None
    except (pa.ArrowException, ValueError, OverflowError) as e:
        if part.num_rows == 1:
            yield None, RowError("a value can't be read", reason="unreadable_value", why=str(e))
            return
        for i in range(part.num_rows):
            yield from _values(part.slice(i, 1))


def _shard(path: Path) -> Callable[[], Iterator[Any]]:
    with path.open("rb") as f:
        magic = f.read(6)
    if magic.startswith(b"PAR1"):
        return partial(_parquet_batches, path)
    return partial(_ipc_batches, path, magic == b"ARROW1")


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH)


def _ipc_batches(path: Path, is_file: bool) -> Iterator[Any]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as f:
        if is_file:
            file = pa.ipc.open_file(f)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            yield from pa.ipc.open_stream(f)


def _saved_shards(path: Path, split: str | None) -> list[Path]:
    """The Arrow files of a directory that `datasets` saved, in order."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            path = path / _the_split(splits, split, str(path))
        state = json.loads((path / "state.json").read_text())
        shards = [path / f["filename"] for f in state["_data_files"]]
    except FileNotFoundError:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "(nothing)"
        fix = "give one file, a directory that datasets saved, or hf:DIRECTORY"
        raise DataError("not a saved dataset", where=str(path), why=f"it holds {inside}", fix=fix) from None
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(
            "not a saved dataset", where=str(path), why=f"its description is broken: {e!r}"
        ) from None
    if lost := [p for p in shards if not p.is_file()]:
        raise DataError("a part of the saved dataset is missing", where=str(lost[0]))
    return shards


def _the_split(splits: Iterable[str], split: str | None, where: str) -> str:
    splits = list(splits)
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        what = (
            "the dataset has several splits"
            if split is None
            else f"there is no split {split!r}{nearest(split, splits)}"
        )
        raise DataError(what, where=where, fix=f"give split=, one of {', '.join(splits)}")
    return split


def _hub(name: str, split: str | None) -> Iterator[_Raw]:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "datasets", needed_for=f"hf:{name}") from None
    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None, streaming=True)
        rows = iter(splits[_the_split(splits, split, f"hf:{name}")])
        yield from (_Raw(f"row {n}", row) for n, row in enumerate(rows, 1))
    except DataError:
        raise
    except Exception as e:  # the library and those beneath it raise what they like
        raise DataError(
            "the datasets library can't read it", where=f"hf:{name}", why=f"{type(e).__name__}: {e}"
        ) from e
