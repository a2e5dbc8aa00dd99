"""Files that are damaged, or small and vast when read: our own error, in bounded memory and linear time."""

from __future__ import annotations

import gzip
import json
import random
import struct
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ygivenx.errors import DataError
from ygivenx.rows.data import Pair, Row, read

ROWS = [{"x": f"{n}+{n}=", "y": str(2 * n), "m": [{"role": "user", "content": f"é{n}"}]} for n in range(40)]
GOOD = b'{"x": "1+1=", "y": "2"}'
MB = 1 << 20


def arrow(new, *, dictionary=False, rows=ROWS):
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    if dictionary:
        table = table.set_column(0, "x", table["x"].dictionary_encode())
    with new(sink, table.schema) as out:
        for batch in table.to_batches(max_chunksize=30):
            out.write_batch(batch)
    return sink.getvalue().to_pybytes()


KINDS = {
    "file": lambda: arrow(pa.ipc.new_file),
    "stream": lambda: arrow(pa.ipc.new_stream),
    "dictionary": lambda: arrow(pa.ipc.new_file, dictionary=True),
    "feather": lambda: arrow(partial_file(compression="zstd")),
}


def partial_file(**options):
    return lambda sink, schema: pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options))


def in_a_process(code: str, *paths, megabytes: int = 4096, seconds: int = 60) -> list[str]:
    """The lines that code prints for these paths in a process of limited memory; a crash fails."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20},) * 2)\n"
    args = [sys.executable, "-c", limit + code, *map(str, paths)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.splitlines()


OUTCOMES = """
import sys
from ygivenx.errors import DataError
from ygivenx.rows.data import read
for path in sys.argv[1:]:
    try:
        reader = read(path)
        rows = list(reader)
        assert reader.accepted + reader.quarantined == len(rows)
        print("read", *reader.reasons)
    except DataError as e:
        print(e.what)
"""
# The most that a process needs beside what it reads, to be taken off its peak.
PEAK = """
import resource, sys
from ygivenx.errors import DataError
from ygivenx.rows import columnar, data
import pyarrow, pyarrow.parquet
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, counts = peak(), {}
try:
    for row in data.read(sys.argv[1]):
        name = getattr(row, "reason", "row")
        counts[name] = counts.get(name, 0) + 1
        del row
except DataError as e:
    counts[e.what] = 1
print((peak() - before) // 1024, counts)
"""


@pytest.mark.parametrize("kind", ["file", "stream", "dictionary"])
def test_an_offset_that_leads_out_of_the_file_is_an_error_of_ours(tmp_path, kind):
    data = KINDS[kind]()
    offsets = data.find(struct.pack("<4i", 0, 4, 8, 12))
    paths = []
    for slot, value in ((2, 2**30), (30, 3000), (2, -5), (30, 2**31 - 1), (1, 7)):
        damaged = bytearray(data)
        damaged[offsets + 4 * slot : offsets + 4 * slot + 4] = struct.pack("<i", value)
        paths.append(tmp_path / f"{slot}_{value}.arrow")
        paths[-1].write_bytes(damaged)
    outcomes = in_a_process(OUTCOMES, *paths)
    assert outcomes[:4] == ["the column 'x' is damaged"] * 4
    assert len(outcomes) == 5


def test_a_bad_offset_behind_a_text_that_is_not_utf8_is_found(tmp_path):
    """In one column: an object whose first text isn't UTF-8, and whose second one has the offset."""
    data = arrow(pa.ipc.new_file, rows=[{"x": {"a": "abcd", "b": "efgh"}, "y": "2"}] * 30)
    first = data.find(struct.pack("<4i", 0, 4, 8, 12))
    second = data.find(struct.pack("<4i", 0, 4, 8, 12), first + 16)
    damaged = bytearray(data)
    damaged[data.find(b"abcd")] = 0xFF
    (tmp_path / "text.arrow").write_bytes(damaged)
    damaged[second + 80 : second + 84] = struct.pack("<i", 2**30)
    (tmp_path / "both.arrow").write_bytes(damaged)
    assert in_a_process(OUTCOMES, tmp_path / "text.arrow", tmp_path / "both.arrow") == [
        "read unreadable_value wrong_type", "the column 'x' is damaged",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_arrow_files_never_crash(tmp_path, kind):
    rng, data, paths = random.Random(kind), KINDS[kind](), []
    for n in range(100):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(len(data))] = rng.choice((0, 127, 128, 255, rng.randrange(256)))
        paths.append(tmp_path / f"{n}.arrow")
        paths[-1].write_bytes(damaged[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
    outcomes = in_a_process(OUTCOMES, *paths)
    assert len(outcomes) == 100
    assert any(o.startswith("read") for o in outcomes)
    assert any(not o.startswith("read") for o in outcomes)


# --- small in the file, vast in memory -------------------------------------------------------------------


def written(path, **columns):
    pq.write_table(pa.table(columns), path, compression="zstd")
    assert path.stat().st_size < 4000
    return path


def peak_of(path) -> tuple[int, str]:
    """(MiB of the peak beyond the modules, what was read)."""
    megabytes, _, counts = in_a_process(PEAK, path)[-1].partition(" ")
    return int(megabytes), counts


def test_a_dictionary_that_repeats_a_long_text_is_read_a_few_rows_at_a_time(tmp_path):
    path = written(tmp_path / "a.parquet", x=pa.array(["a" * 6_000_000] * 256), y=["b"] * 256)
    megabytes, counts = peak_of(path)
    assert counts == "{'row': 256}"
    assert megabytes < 300  # 1.6 GB are in it


@pytest.mark.parametrize("others", [0, 255])
def test_runs_of_one_number_that_would_fill_memory_are_refused(tmp_path, others):
    ids = pa.array([[0] * 100_000_000] + [[0]] * others, pa.list_(pa.int32()))
    path = written(tmp_path / "a.parquet", input_ids=ids, labels=[[0]] * (1 + others))
    megabytes, counts = peak_of(path)
    assert "100,0" not in counts
    assert "the column 'input_ids.list.element' has 400,0" in counts
    assert megabytes < 100


def test_token_rows_of_a_usual_size_are_no_suspects(tmp_path):
    masks = pa.array([[1] * 1000] * 20_000, pa.list_(pa.int8()))
    ids = pa.array([[7] * 1000] * 20_000, pa.list_(pa.int32()))
    pq.write_table(
        pa.table({"input_ids": ids, "loss_mask": masks}), tmp_path / "a.parquet", compression="zstd"
    )
    reader = read(tmp_path / "a.parquet", limit=300)
    assert all(isinstance(r, Row) for r in reader)
    assert reader.read == 300


def test_a_row_beyond_the_limit_costs_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("ygivenx.rows.columnar.MAX_ROW_BYTES", 3000)
    rows = [{"x": "a", "y": "b"}, {"x": "a" * 5000, "y": "b"}, {"x": "c", "y": "d"}]
    (tmp_path / "a.arrow").write_bytes(arrow(pa.ipc.new_file, rows=rows))
    monkeypatch.setattr("ygivenx.rows.columnar.MAX_BATCH_BYTES", 6000)
    assert [getattr(r, "reason", "row") for r in read(tmp_path / "a.arrow")] == ["row", "too_long", "row"]


BRACKETS = b"[" + b"[]," * 20_000_000 + b"[]]"


@pytest.mark.parametrize(
    ("name", "data", "counts"),
    [
        ("a.jsonl", b'{"x": ' + BRACKETS + b"}\n" + GOOD, "{'too_long': 1, 'row': 1}"),
        ("a.json", b'[{"x": ' + BRACKETS + b"}]", "array is broken"),
        ("b.json", b'{"x": ' + BRACKETS + b"}", "when read"),
        ("a.csv", b"x,y\n" + b"1," * 30_000_000 + b"\n", "{'too_long': 1"),
        ("a.json.gz", gzip.compress(b'{"a": "' + b" " * (400 * MB), 1), "one object of more than"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": "' + b" " * (400 * MB) + b"\n" + GOOD, 1),
            "{'too_long': 1, 'row': 1}",
        ),
        ("b.json.gz", gzip.compress(b"[" + b" " * (400 * MB) + GOOD + b"]", 1), "{'row': 1}"),
    ],
    ids=["line", "element", "object", "cells", "gzip object", "gzip line", "gzip space"],
)
def test_small_texts_that_would_fill_memory(tmp_path, name, data, counts):
    path = tmp_path / name
    path.write_bytes(data)
    megabytes, found = peak_of(path)
    assert counts in found
    assert megabytes < 900


@pytest.mark.parametrize("name", ["a.json", "b.json", "a.jsonl", "a.csv"])
def test_white_space_is_passed_in_linear_time(tmp_path, name):
    """100 MB of spaces within a few seconds: one by one they took twenty."""
    space, path = b" " * (100 * MB), tmp_path / name
    text = {"a.json": space + b"[" + GOOD + space + b"]", "b.json": space + GOOD}.get(name, space + b"\n")
    path.write_bytes(text)
    start = time.perf_counter()
    try:
        items = list(read(path))
    except DataError as e:
        items = [e]
    assert time.perf_counter() - start < 6
    assert [i.value for i in items if isinstance(i, Row)] == (
        [Pair("1+1=", "2")] if name.endswith(".json") else []
    )


def test_blocks_of_nul_are_named_and_cost_their_line_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + b"\0" * (10 * MB) + b"\n" + GOOD + b"\n" + GOOD[:9] + b"\0" * 4096)
    first, torn, second, last = read(path)
    assert (first.value, second.value) == (Pair("1+1=", "2"),) * 2
    assert (torn.reason, last.reason) == ("broken_json", "cut_off")
    assert all("loss of power" in r.message for r in (torn, last))


# --- files under a wrong name ----------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_rows_under_the_name_of_lines(tmp_path, indent):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps([{"x": str(n), "y": "b"} for n in range(3)], indent=indent))
    assert [i.value for i in read(path)] == [Pair(str(n), "b") for n in range(3)]


def test_a_list_of_messages_a_line_lacks_its_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps([{"role": "user", "content": "?"}]) + "\n") * 2)
    for rejected in read(path):
        assert rejected.reason == "not_an_object"
        assert '{"messages": [...]}' in rejected.message


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        (b'{"x": "1", "y": "2",}', "comma after the last item"),
        (b'{"x": "1", "y": "2"},', "comma after the last item"),
        (b"{'x': '1', 'y': '2'}", "json.dumps"),
        (b"""{"x": "1", 'y': "2"}""", "json.dumps"),
        (GOOD + GOOD, "one row a line"),
    ],
)
def test_a_line_that_is_almost_json_says_what_it_is(tmp_path, line, fix):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n" + GOOD + b"\n")
    bad, good = read(path)
    assert bad.reason == "broken_json"
    assert fix in bad.message.partition("fix: ")[2]
    assert good.value == Pair("1+1=", "2")


def test_rows_printed_over_several_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"x": "1", "y": "2"}, indent=2) + "\n" for _ in range(2)))
    with pytest.raises(DataError, match="printed over several lines"):
        list(read(path))


def test_trailing_commas_of_an_array_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + GOOD + b",\n]")
    with pytest.raises(DataError, match="comma after the last item"):
        list(read(path))
