"""Raw rows of Parquet and Arrow files, of directories that `datasets` saved, and of what that library finds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, MissingExtra, RowError, nearest
from .raw import MAX_BATCH_BYTES, MAX_ROW_BYTES, RawRow, too_long

if TYPE_CHECKING:
    from pyarrow import RecordBatch

_BATCH = 256  # rows that are Python objects at a time
_FEWEST = 8  # rows of Parquet that are decoded at a time, however long they may be: fewer cost more than their decoding
_SUSPECT = 1 << 20  # bytes of a row on average, from which on
_RATIO = 1000  # such an expansion isn't text's or token ids'


def arrow_rows(paths: Iterable[Path], *, arrays: bool = False) -> Iterator[RawRow]:
    """The rows of Parquet and Arrow files, numbered from 0 over all of them. arrays: lists of numbers as NumPy's."""
    numbers = count()
    for batch in (b for path in paths for b in _batches(path)):
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise DataError(f"a column occurs twice among {', '.join(names)}")
        size = _rows_at_a_time(batch)
        for start in range(0, batch.num_rows, size):
            for value, fault in _values(batch.slice(start, size), arrays):
                yield RawRow(f"row {next(numbers)}", value, fault)


def _batches(path: Path) -> Iterator[RecordBatch]:
    """Record batches of a Parquet file, an Arrow file or an Arrow stream, by what it is."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as f:
        magic = f.read(6)
        f.seek(0)
        # By its first bytes: files of all three kinds are called .arrow or .parquet.
        if magic.startswith(b"PAR1"):
            yield from _parquet_batches(f)
        elif magic == b"ARROW1":
            file = pa.ipc.open_file(f)
            yield from (_sound(file.get_batch(i)) for i in range(file.num_record_batches))
        else:
            yield from map(_sound, pa.ipc.open_stream(f))


# --- Parquet: as many rows at a time as may be held -----------------------------------------------------


def _parquet_batches(source: Any) -> Iterator[RecordBatch]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(source)
    for i in range(file.num_row_groups):
        group = file.metadata.row_group(i)
        chunks = [group.column(c) for c in range(group.num_columns)]
        for chunk in chunks:
            _refuse_expansion(chunk, group.num_rows, file.schema)
        # A dictionary holds a long text once and repeats it by number, so that any row may be as long as all of it.
        longest = max((_decoded_size(c) for c in chunks), default=0)
        size = min(max(MAX_BATCH_BYTES // max(longest, 1), _FEWEST), _BATCH)
        yield from file.iter_batches(batch_size=size, row_groups=[i])


def _decoded_size(chunk: Any) -> int:
    """The bytes of a column chunk's values, at least: runs of equal numbers take no place in the file."""
    widths = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4}
    return int(max(chunk.total_uncompressed_size, chunk.num_values * widths.get(chunk.physical_type, 8)))


def _refuse_expansion(chunk: Any, rows: int, schema: Any) -> None:
    """Raise DataError for a chunk that decodes to rows longer than the limit, or to far more than it is in the file."""
    size = _decoded_size(chunk)
    average, ratio = size / max(rows, 1), size / max(chunk.total_compressed_size, 1)
    if average > MAX_ROW_BYTES or (size > MAX_BATCH_BYTES and ratio > _RATIO and average > _SUSPECT):
        what = f"the column {chunk.path_in_schema!r} has {size:,} bytes in {rows:,} rows"
        why = f"they take {chunk.total_compressed_size:,} bytes in the file; a row may have {MAX_ROW_BYTES:,}"
        raise DataError(what, why=why, fix="split long rows, or rewrite the file with shorter ones")


# --- Arrow: nothing is believed --------------------------------------------------------------------------


def _sound(batch: RecordBatch) -> RecordBatch:
    """A batch of which every offset was checked: Arrow's own functions read beyond the file by one that is wrong."""
    import pyarrow as pa

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            _as_bytes(column).validate(full=True)
        except (pa.ArrowException, ValueError, IndexError) as e:
            if "UTF8" in str(e):  # costs its own row alone, when that is read
                continue
            raise DataError(f"the column {name!r} is damaged", why=str(e)) from None
    return batch


def _as_bytes(array: Any) -> Any:
    """The same array with texts as bytes, whose encoding isn't looked at: a bad offset behind a bad text is found."""
    import pyarrow as pa

    array.validate()
    try:
        return array.view(_bytes_type(array.type))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return array


def _bytes_type(kind: Any) -> Any:
    import pyarrow as pa

    t = pa.types
    if t.is_string(kind):
        return pa.binary()
    if t.is_large_string(kind):
        return pa.large_binary()
    if t.is_struct(kind):
        return pa.struct(
            [kind.field(i).with_type(_bytes_type(kind.field(i).type)) for i in range(kind.num_fields)]
        )
    if t.is_list(kind):
        return pa.list_(kind.value_field.with_type(_bytes_type(kind.value_type)))
    if t.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_bytes_type(kind.value_type)))
    return kind


def _rows_at_a_time(batch: RecordBatch) -> int:
    """How many rows may be Python objects together.

    Where several rows may refer to one value, as in dictionaries, each row may be as long as all values.
    """
    size = sum(buffer.size for column in batch.columns for buffer in column.buffers() if buffer is not None)
    if size <= MAX_ROW_BYTES and not any(_shares(column.type) for column in batch.columns):
        return _BATCH
    return int(min(max(MAX_BATCH_BYTES // max(size + _dictionary_size(batch), 1), 1), _BATCH))


def _shares(kind: Any) -> bool:
    """Whether rows of such a type may refer to one value."""
    import pyarrow as pa

    t = pa.types
    views = (
        t.is_string_view(kind) or t.is_binary_view(kind) or t.is_list_view(kind) or t.is_large_list_view(kind)
    )
    if views or t.is_dictionary(kind) or t.is_run_end_encoded(kind):
        return True
    return any(_shares(kind.field(i).type) for i in range(kind.num_fields))


def _dictionary_size(batch: RecordBatch) -> int:
    import pyarrow as pa

    return sum(c.dictionary.nbytes for c in batch.columns if isinstance(c, pa.DictionaryArray))


def _values(batch: RecordBatch, arrays: bool = False) -> Iterator[tuple[Any, RowError | None]]:
    """(row as a dict, None); (None, fault) for one without a Python value, such as text that isn't UTF-8."""
    import pyarrow as pa

    if batch.num_rows == 1 and batch.nbytes > MAX_ROW_BYTES:
        yield None, too_long(MAX_ROW_BYTES)
        return
    try:
        rows = _with_arrays(batch) if arrays else batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as e:
        if batch.num_rows > 1:
            # One by one, so that a value costs its own row and no other.
            for i in range(batch.num_rows):
                yield from _values(batch.slice(i, 1), arrays)
        else:
            yield None, RowError("a value can't be read", reason="unreadable_value", why=str(e))
        return
    yield from ((_without_nulls(row), None) for row in rows)


def _with_arrays(batch: RecordBatch) -> list[dict[str, Any]]:
    columns = map(_numbers, batch.columns)
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _numbers(column: Any) -> list[Any]:
    """A column of lists of numbers as arrays, views of one; any other as Python's values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_list(column.type) else None
    number = kind is not None and (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )
    if not number or column.null_count or (flat := column.flatten()).null_count:
        return list(column.to_pylist())
    ends = np.cumsum(pc.list_value_length(column).to_numpy())
    return np.split(flat.to_numpy(zero_copy_only=False), ends[:-1])


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose objects lack what is null: Arrow gives each of them every key that another one of its column has.

    Else a call would have the arguments of other calls, and a tool their parameters.
    """
    return {column: _bare(value) for column, value in row.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items() if v is not None}
    if isinstance(value, list) and isinstance(next((v for v in value if v is not None), None), dict | list):
        return [_bare(v) for v in value]
    return value


def saved_shards(path: Path, split: str | None) -> list[Path]:
    """The Arrow files of a directory that `datasets` saved, in order."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
            path = path / _choose(splits, split, str(path))
        state = json.loads((path / "state.json").read_text("utf-8"))
        shards = [path / f["filename"] for f in state["_data_files"]]
    except FileNotFoundError:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
        fix = "give one file, a directory that datasets saved, or hf:DIRECTORY"
        raise DataError("not a saved dataset", where=str(path), why=f"it holds {inside}", fix=fix) from None
    except (ValueError, LookupError, TypeError) as e:
        raise DataError(
            "its description is broken", where=str(path), why=f"{type(e).__name__}: {e}"
        ) from None
    if lost := [p for p in shards if not p.is_file()]:
        raise DataError("a part of the dataset is missing", where=str(lost[0]))
    return shards


def _choose(splits: Iterable[str], split: str | None, where: str) -> str:
    splits = list(splits)
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        what = (
            "the dataset has several splits"
            if split is None
            else f"no split {split!r}{nearest(split, splits)}"
        )
        raise DataError(what, where=where, fix=f"give split= (--split), one of {', '.join(splits)}")
    return split


def hub_rows(name: str, split: str | None) -> Iterator[RawRow]:
    """The rows of `NAME[:CONFIG]` as the datasets library streams them."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "train", needed_for=f"hf:{name}") from None
    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None, streaming=True)
        rows = splits[_choose(splits, split, f"hf:{name}")]
        yield from (RawRow(f"row {n}", _without_nulls(row)) for n, row in enumerate(rows))
    except DataError:
        raise
    except Exception as e:  # the library and those beneath it raise what they like
        why = f"{type(e).__name__}: {e}"
        raise DataError("the datasets library can't read it", where=f"hf:{name}", why=why) from e
