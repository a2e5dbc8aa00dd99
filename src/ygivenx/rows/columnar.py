"""Raw rows of Parquet and Arrow files, of directories that `datasets` saved, and of what that library finds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingExtra, RowError, nearest
from .raw import RawRow

_BATCH = 256  # rows that are Python objects at a time


def arrow_rows(paths: Iterable[Path]) -> Iterator[RawRow]:
    numbers = count()
    for batch in (b for path in paths for b in _batches(path)):
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise DataError(f"a column occurs twice among {', '.join(names)}")
        for start in range(0, batch.num_rows, _BATCH):
            for value, fault in _values(batch.slice(start, _BATCH)):
                yield RawRow(f"row {next(numbers)}", value, fault)


def _batches(path: Path) -> Iterator[Any]:
    """Record batches of a Parquet file, an Arrow file or an Arrow stream, by what it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as f:
        magic = f.read(6)
        f.seek(0)
        if magic.startswith(b"PAR1"):
            yield from pq.ParquetFile(f).iter_batches(batch_size=_BATCH)
        elif magic == b"ARROW1":
            file = pa.ipc.open_file(f)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            yield from pa.ipc.open_stream(f)


def _values(batch: Any) -> Iterator[tuple[Any, RowError | None]]:
    """(row as a dict, None); (None, fault) for one without a Python value, such as text that isn't UTF-8."""
    import pyarrow as pa

    try:
        rows = batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as e:
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from _values(batch.slice(i, 1))
        else:
            yield None, RowError("a value can't be read", reason="unreadable_value", why=str(e))
        return
    yield from ((_without_nulls(row), None) for row in rows)


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
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "datasets", needed_for=f"hf:{name}") from None
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
