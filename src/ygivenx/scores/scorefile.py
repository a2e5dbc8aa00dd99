"""A file of scores that grows in input order and, after an interruption, goes on where it ended.

JSON Lines are written as they come. Parquet can't be appended to: its rows wait as JSON Lines in
`NAME.parquet.jsonl` and become the Parquet file, whole, at the end. Beside it, `NAME.run.json` says which
run the file belongs to; a file of another run is refused, never overwritten.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..disk import replace_text, replaced
from ..errors import ConfigError, DataError

BATCH = 4096  # rows of one Parquet row group
SYNC = 5.0  # seconds of work that a loss of power may cost


class ScoreFile:
    """`path`: `.jsonl` or `.parquet`. `run`: what the scores depend on, as plain types.

    done: records that are already there. Raises ConfigError for another kind of file, and for a file that
    belongs to another run or to none.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        if path.suffix not in (".jsonl", ".parquet"):
            raise ConfigError(
                f"unknown kind of file {path.suffix!r}", where=str(path), fix=".jsonl or .parquet"
            )
        self.path = path
        self.parquet = path.suffix == ".parquet"
        self.lines = path.with_name(path.name + ".jsonl") if self.parquet else path
        self.note = path.with_name(path.name + ".run.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._claim(json.loads(json.dumps(dict(run))))  # as it will be read back
        self.finished = self.parquet and path.exists()
        if self.finished:
            self.lines.unlink(missing_ok=True)  # an interruption may have come before `finish` did
        self.done = 0 if self.finished else _whole_lines(self.lines)

    def _claim(self, run: dict[str, Any]) -> None:
        present = self.path.exists() or self.lines.exists()
        if not present:
            replace_text(self.note, json.dumps({"run": run}, indent=1, default=str))
            return
        if not self.note.exists():
            raise ConfigError("the file exists and isn't a run's", where=str(self.path), fix=_OTHER)
        before = _note(self.note)["run"]
        differs = [k for k in run.keys() | before.keys() if run.get(k) != before.get(k)]
        if differs:
            raise ConfigError(
                "the file belongs to another run",
                where=str(self.path),
                why="these differ: "
                + ", ".join(f"{k} ({before.get(k)} → {run.get(k)})" for k in sorted(differs)),
                fix=_OTHER,
            )

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records as they come; each is in the file when the next is asked for, and on the disk soon."""
        synced = time.monotonic()
        # Each line is flushed, so that an interruption costs no score. Only a loss of power needs fsync, which takes
        # longer than many a score.
        with self.lines.open("a", encoding="utf-8") as out:
            for record in records:
                out.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                out.flush()
                if time.monotonic() - synced > SYNC:
                    os.fsync(out.fileno())
                    synced = time.monotonic()
            os.fsync(out.fileno())

    def keep(self, count: int) -> None:
        """Cut the file off behind its first `count` records."""
        with self.lines.open("r+b") as file:
            for _ in range(count):
                file.readline()
            file.truncate(file.tell())
        self.done = count

    def records(self) -> Iterator[dict[str, Any]]:
        """The records that are there, in order."""
        if self.lines.exists():
            with self.lines.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    @property
    def account(self) -> dict[str, Any]:
        """What `finish` was given by the run that completed the file. Raises DataError if it is missing."""
        note = _note(self.note)
        if "account" not in note:
            raise DataError(
                "it has no account of the run",
                where=str(self.note),
                why="it was changed",
                fix=f"delete {self.path}",
            )
        return dict(note["account"])

    def finish(self, account: Mapping[str, Any]) -> None:
        """The Parquet file, if that is asked for, and the account of the run beside it."""
        note = _note(self.note)
        # The account comes first: a Parquet file without one would be complete and couldn't be read back.
        replace_text(self.note, json.dumps(note | {"account": dict(account)}, indent=1, default=str))
        if self.parquet and not self.finished:  # last: where it is, everything is
            _to_parquet(self.lines, self.path)
            self.lines.unlink()


_OTHER = "name another file, or delete this one"


def run_before(path: Path) -> dict[str, Any]:
    """The settings of the run that a file of scores belongs to; empty where there is no such file."""
    file, note = (path.with_name(path.name + suffix) for suffix in (".jsonl", ".run.json"))
    present = note.exists() and (path.exists() or file.exists())
    return _note(note)["run"] if present else {}


def _note(path: Path) -> dict[str, Any]:
    """What stands beside a file of scores. Raises DataError where it is damaged."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(note["run"], dict):
            return dict(note)
        raise TypeError("run is no mapping")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "what is known of the run is damaged",
            where=str(path),
            why=f"{error!r}: so nobody can say whether the scores beside it belong to this run",
            fix="delete it and the file of scores, or name another file",
        ) from error


def _whole_lines(path: Path) -> int:
    """Lines of a file; what an interruption or a loss of power left behind the last whole record is cut off."""
    if not path.exists():
        return 0
    count = whole = 0
    with path.open("r+b") as file:
        for line in file:
            # Nothing behind the first broken line is kept: records are matched to requests by their order.
            if not line.endswith(b"\n") or not _is_record(line):
                break
            count, whole = count + 1, whole + len(line)
        file.truncate(whole)
    return count


def _is_record(line: bytes) -> bool:
    """Whether a line is a record; zeros, which a file system may leave, are none."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _to_parquet(lines: Path, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [(n, getattr(pa, kind)()) for n, kind in _COLUMNS.items()]
    lists = [(n, pa.list_(getattr(pa, kind)())) for n, kind in _LISTS.items()]
    segment = {"kind": pa.string(), "message": pa.int64(), "field": pa.string(), "output": pa.bool_(),
               "tokens": pa.int64(), "log_p": pa.float64()}  # fmt: skip
    nested = [
        ("token_top_ids", pa.list_(pa.list_(pa.int64()))),
        ("token_top_log_p", pa.list_(pa.list_(pa.float64()))),
        ("segments", pa.list_(pa.struct(segment))),
    ]
    schema = pa.schema([*columns, *lists, *nested])
    with (
        replaced(path) as new,
        lines.open(encoding="utf-8") as file,
        pq.ParquetWriter(new, schema) as out,
    ):
        while batch := [json.loads(line) for line in islice(file, BATCH)]:
            # pyarrow would drop a column that the schema lacks without a word.
            unknown = batch[0].keys() - set(schema.names)
            if unknown:
                raise DataError(f"no column for {', '.join(sorted(unknown))}", where=str(lines))
            out.write_table(pa.Table.from_pylist(batch, schema))


_COLUMNS = {
    **dict.fromkeys(("row", "sequence", "tokens", "tokens_x", "scored", "truncated"), "int64"),
    **dict.fromkeys(("bytes", "characters", "words"), "int64"),
    **dict.fromkeys(("log_p_x", "log_p_y_given_x", "log_p_xy", "log_p_y"), "float64"),
    **dict.fromkeys(("per_token", "per_byte", "per_character", "perplexity", "pmi"), "float64"),
    **dict.fromkeys(("greedy", "conditional_on_first", "gold"), "bool_"),
}
_LISTS = {
    "token_log_p": "float64", "token_rank": "int64", "token_text": "string", "token_entropy": "float64",
    "word_text": "string", "word_log_p": "float64", "word_log_p_corrected": "float64", "notes": "string",
}  # fmt: skip
