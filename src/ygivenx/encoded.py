"""Encoded rows as Arrow tables, in memory or in a memory-mapped file: what a data set of any size becomes.

| column        | type          | what                                                               |
|---------------|---------------|--------------------------------------------------------------------|
| row, sequence | int64         | which row that was read, which of its sequences (several if split) |
| input_ids     | list<int32>   | token ids                                                          |
| weights       | list<float32> | weight of each token as a target                                   |
| segments      | list<struct>  | start, stop, kind, output, message                                 |
| notes         | list<string>  | what a reader has to know                                          |
| weight        | float64       | the sum of the weights                                             |
| trained       | int64         | how many of them are > 0                                           |
| digest        | binary(16)    | BLAKE2 of ids and weights: equal ones train the same               |
| log_probs     | list<float32> | of a row of token ids that has them, else null                     |
| advantages    | list<float32> | the same                                                           |
| reward        | float32       | the same                                                           |
"""

from __future__ import annotations

import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from .errors import ConfigError
from .packing import KEYS, Ints
from .sequence import Example, Logged, Segment, Sequence

BATCH = 1024  # sequences of a table


# -- tables ------------------------------------------------------------------------------------------------


def schema() -> Any:
    """The columns as a pyarrow schema."""
    import pyarrow as pa

    whole, kinds = pa.int32(), {"start": pa.int32(), "stop": pa.int32(), "kind": pa.string()}
    return pa.schema(
        {
            "row": pa.int64(),
            "sequence": pa.int64(),
            "input_ids": pa.list_(whole),
            "weights": pa.list_(pa.float32()),
            "segments": pa.list_(pa.struct({**kinds, "output": pa.bool_(), "message": whole})),
            "notes": pa.list_(pa.string()),
            "weight": pa.float64(),
            "trained": pa.int64(),
            "digest": pa.binary(16),
            "log_probs": pa.list_(pa.float32()),
            "advantages": pa.list_(pa.float32()),
            "reward": pa.float32(),
        }
    )


def table_of(sequences: list[tuple[int, int, Sequence]]) -> Any:
    """A pyarrow RecordBatch of (row, number in the row, sequence)."""
    import pyarrow as pa

    parts = [s for _, _, s in sequences]
    fields = schema()
    segments = [g for s in parts for g in s.segments]
    kind = fields.field("segments").type.value_type
    struct = pa.StructArray.from_arrays(
        [pa.array([getattr(g, f.name) for g in segments], f.type) for f in kind], fields=list(kind)
    )
    columns = [
        pa.array([row for row, _, _ in sequences], pa.int64()),
        pa.array([n for _, n, _ in sequences], pa.int64()),
        _lists([len(s) for s in parts], _flat([s.ids for s in parts], np.int32)),
        _lists([len(s) for s in parts], _flat([s.weights for s in parts], np.float32)),
        _lists([len(s.segments) for s in parts], struct),
        pa.array([list(s.notes) for s in parts], pa.list_(pa.string())),
        np.array([s.weights.sum(dtype=np.float64) for s in parts], np.float64),
        np.array([(s.weights > 0).sum() for s in parts], np.int64),
        pa.array(list(map(_digest, parts)), pa.binary(16)),
        *(pa.array([getattr(s.logged, n) for s in parts], fields.field(n).type) for n in Logged._fields),
    ]
    return pa.record_batch(columns, schema=fields)


def _flat(parts: list[Any], dtype: Any) -> Any:
    return np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)


def _lists(sizes: list[int], values: Any) -> Any:
    import pyarrow as pa

    offsets = pa.array([0, *accumulate(sizes)], pa.int32())
    return pa.ListArray.from_arrays(offsets, values if isinstance(values, pa.Array) else pa.array(values))


def _digest(s: Sequence) -> bytes:
    digest = hashlib.blake2b(s.ids.tobytes(), digest_size=16)
    digest.update(s.weights.tobytes())
    return digest.digest()


def tables(examples: Iterable[Example]) -> Iterator[Any]:
    """Examples as RecordBatches of about BATCH sequences, as they come; a row without a number gets its place."""
    kept: list[tuple[int, int, Sequence]] = []
    for place, example in enumerate(examples):
        number = place if example.index is None else example.index
        kept += [(number, n, s) for n, s in enumerate(example)]
        if len(kept) >= BATCH:
            yield table_of(kept)
            kept = []
    if kept:
        yield table_of(kept)


# -- reading -----------------------------------------------------------------------------------------------


class SegmentColumns(NamedTuple):
    """Segments of several sequences. start, stop: places in ids, which are those of all of them.

    sequence, message int64 (−1: none), output bool; kind: a pyarrow array of strings.
    """

    sequence: Ints
    start: Ints
    stop: Ints
    kind: Any
    output: Any
    message: Ints
    ids: Any

    def of_kind(self, kind: str) -> Any:
        """bool [segments]."""
        import pyarrow.compute as pc

        return pc.equal(self.kind, kind).to_numpy(zero_copy_only=False)


class EncodedRows:
    """Sequences by number: `rows[i]` is a Sequence, without the texts of its tokens.

    length, row, turn, trained: int64 [n], of each sequence: its tokens, the number of its row, its number in that row,
    its tokens with a weight. weight: float64 [n], the sum of its weights. counts: int64 [n], how often each is seen in
    an epoch; 1 unless it is set.
    """

    def __init__(
        self, batches: Iterable[Any], mapped: Iterable[mmap.mmap] = (), names: Iterable[str] = ()
    ) -> None:
        self._batches, self._mapped = list(batches), list(mapped)
        # Of the file of each table, where there are several.
        self._names = list(names) or [""] * len(self._batches)
        self._origin: tuple[Any, ...] = (EncodedRows, (self._batches, (), self._names))
        self._first: list[int] = [0, *accumulate(b.num_rows for b in self._batches)]
        self._offsets = [b.column("input_ids").offsets.to_numpy() for b in self._batches]
        self._ids = [b.column("input_ids").values.to_numpy() for b in self._batches]
        self._weights = [b.column("weights").values.to_numpy() for b in self._batches]
        self.length = _flat([np.diff(o) for o in self._offsets], np.int64)
        self.row, self.turn, self.trained = (
            self._column(n, np.int64) for n in ("row", "sequence", "trained")
        )
        self.weight = self._column("weight", np.float64)
        self.counts = np.ones(len(self), np.int64)

    @classmethod
    def of(cls, items: Iterable[Any]) -> EncodedRows:
        """From Examples and Sequences, in memory. Raises ConfigError for an item that is neither."""
        if isinstance(items, EncodedRows):
            return items
        return cls(tables(_example(i, item) for i, item in enumerate(items)))

    @classmethod
    def open(cls, path: Path, name: str = "") -> EncodedRows:
        """A file of `write`, mapped into memory; `name` is what its rows are said to be of. Raises ValueError."""
        import pyarrow as pa

        # Mapped, not read: rows may be more than memory holds.
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        if not reader.schema.equals(schema()):
            raise ValueError(f"{path} has other columns")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        rows = cls(batches, [mapped], [name] * len(batches))
        rows._origin = (EncodedRows.open, (path, name))
        return rows

    @classmethod
    def joined(cls, parts: list[EncodedRows]) -> EncodedRows:
        """The rows of several, one after another."""
        if len(parts) == 1:
            return parts[0]
        several = [[x for p in parts for x in getattr(p, at)] for at in ("_batches", "_mapped", "_names")]
        rows = cls(*several)
        rows.counts = _flat([p.counts for p in parts], np.int64)
        rows._origin = (_joined_again, tuple(p._origin for p in parts))
        return rows

    def __reduce__(self) -> tuple[Any, ...]:
        """For a worker that isn't a fork: files are mapped again, so that no copy of all rows is sent."""
        return (*self._origin, {"counts": self.counts})

    def __len__(self) -> int:
        return self._first[-1]

    def __iter__(self) -> Iterator[Sequence]:
        for i in range(len(self)):
            yield self[i]
            if not i % BATCH:
                self._let_go()

    def __getitem__(self, i: int) -> Sequence:
        b, j = self._place(i)
        batch = self._batches[b]
        segments = tuple(Segment(**g) for g in batch.column("segments")[j].as_py())
        return Sequence(*self._bare(b, j), segments, notes=tuple(batch.column("notes")[j].as_py()))

    def bare(self, i: int) -> Sequence:
        """Ids and weights alone: what a step of training reads."""
        return Sequence(*self._bare(*self._place(i)))

    def bare_ones(self) -> Iterator[Sequence]:
        """All of them, ids and weights alone."""
        for i in range(len(self)):
            yield self.bare(i)
            if not i % BATCH:
                self._let_go()

    def name(self, i: int) -> str:
        """Where a sequence comes from: "row 3", or "row 3, turn 1"."""
        several = self.turn[i] > 0 or (i + 1 < len(self) and self.turn[i + 1] > 0)
        of = self._names[self._place(i)[0]]
        return (
            f"row {self.row[i]}" + (f" of {of}" if of else "") + (f", turn {self.turn[i]}" if several else "")
        )

    @property
    def firsts(self) -> Ints:
        """int64 [rows]: the first sequence of each row."""
        return np.flatnonzero(self.turn == 0)

    def segments(self) -> Iterator[SegmentColumns]:
        """The segments of all sequences as columns, table by table."""
        for first, batch, offsets, ids in zip(
            self._first, self._batches, self._offsets, self._ids, strict=False
        ):
            column = batch.column("segments")
            of = np.repeat(np.arange(batch.num_rows), np.diff(column.offsets.to_numpy()))
            start, stop, output, message = map(column.values.field, ("start", "stop", "output", "message"))
            start, stop, output, message = (
                c.to_numpy(zero_copy_only=False) for c in (start, stop, output, message.fill_null(-1))
            )
            base = offsets[of]
            yield SegmentColumns(
                first + of, base + start, base + stop, column.values.field("kind"), output, message, ids
            )

    def notes(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(the number of its row, its notes) of each sequence that has any."""
        for batch in self._batches:
            pairs = zip(batch.column("row").to_pylist(), batch.column("notes").to_pylist(), strict=True)
            yield from ((row, tuple(notes)) for row, notes in pairs if notes)

    def examples(self) -> Iterator[Example]:
        """The rows, each with its sequences."""
        for n, (first, stop) in enumerate(pairwise([*self.firsts.tolist(), len(self)])):
            yield Example(tuple(self[i] for i in range(first, stop)), index=int(self.row[first]))
            if not n % BATCH:
                self._let_go()

    @cached_property
    def digest(self) -> Any:
        """bytes [n] of 16 each: of ids and weights of each sequence."""
        return _flat([np.frombuffer(b.column("digest").buffers()[1], "S16") for b in self._batches], "S16")

    def read(self, which: Ints, start: int, stop: int) -> Any:
        """Tokens [start, stop) of some sequences, as `packing` compares them."""
        block = np.zeros((len(which), stop - start), KEYS)
        batch = np.searchsorted(self._first, which, "right") - 1
        arranged = np.argsort(batch, kind="stable")
        cuts = np.flatnonzero(np.diff(batch[arranged])) + 1
        for at in np.split(arranged, cuts) if len(which) else ():
            b = int(batch[at[0]])
            local = which[at] - self._first[b]
            begin, end = self._offsets[b][local] + start, self._offsets[b][local + 1]
            index = begin[:, None] + np.arange(stop - start)
            # Beyond a sequence's end 0, which no id is, since 1 is added to each: the shorter one sorts first.
            inside = index < end[:, None]
            found = self._ids[b][np.minimum(index, len(self._ids[b]) - 1)]
            block[at] = np.where(inside, found + 1, 0)
            self._let_go()
        return block

    def _column(self, name: str, dtype: Any) -> Any:
        parts = [b.column(name).to_numpy(zero_copy_only=False) for b in self._batches]
        return _flat(parts, dtype)

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        b = bisect_right(self._first, i) - 1
        return b, i - self._first[b]

    def _bare(self, b: int, j: int) -> tuple[Any, Any]:
        part = slice(self._offsets[b][j], self._offsets[b][j + 1])
        return self._ids[b][part], self._weights[b][part]

    def _let_go(self) -> None:
        """Pages of the file that were read may leave memory: they come again when they are needed."""
        for mapped in self._mapped if hasattr(mmap, "MADV_DONTNEED") else ():
            mapped.madvise(mmap.MADV_DONTNEED)


def _joined_again(*origins: tuple[Any, ...]) -> EncodedRows:
    return EncodedRows.joined([make(*given) for make, given in origins])


def _example(i: int, item: Any) -> Example:
    if isinstance(item, Example):
        return item if item.index is not None else Example(item.sequences, index=i)
    if isinstance(item, Sequence):
        return Example((item,), index=i)
    raise ConfigError(
        f"item {i} of the data set is a {type(item).__name__}, not an Example or a Sequence",
        why="packs are made of encoded rows: token ids with a weight for each",
        fix="examples, rejected = yx.Encoder(tokenizer).batch(rows), and give it the examples",
    )


def spooled(batches: Iterable[Any]) -> EncodedRows:
    """Tables in a file of their own, which goes with the rows."""
    with TemporaryDirectory() as folder:  # what is mapped stays readable without a name
        write(batches, Path(folder) / "rows.arrow")
        rows = EncodedRows.open(Path(folder) / "rows.arrow")
    rows._origin = (EncodedRows, (rows._batches,))
    return rows


def write(batches: Iterable[Any], path: Path) -> int:
    """An Arrow file of tables, written as they come; returns how many sequences it has."""
    import pyarrow as pa

    count = 0
    with pa.ipc.new_file(str(path), schema()) as writer:
        for batch in batches:
            writer.write_batch(batch)
            count += batch.num_rows
    return count
