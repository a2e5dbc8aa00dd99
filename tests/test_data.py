"""Rows in: every kind of file, every fault with its place, and accepted + quarantined = read, always."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ygivenx.errors import ConfigError, DataError, YgivenxError
from ygivenx.rows.data import Conversation, Pair, Row, read
from ygivenx.sequence import Rejected

ROWS = [{"x": f"{n}+{n}=", "y": str(2 * n)} for n in range(7)]
NOUNS = [Pair(**row) for row in ROWS]
GOOD = b'{"x": "1+1=", "y": "2"}'


def lines(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def csv_of(rows, delimiter=","):
    return "\n".join([delimiter.join(rows[0]), *(delimiter.join(r.values()) for r in rows)]).encode() + b"\n"


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def ipc(new, rows):
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(sink, table.schema) as out:
        for batch in table.to_batches(max_chunksize=3):
            out.write_batch(batch)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def all_of(reader):
    """Every item of a reader, with the books checked."""
    items = list(reader)
    assert sum(isinstance(i, Row) for i in items) == reader.accepted
    assert sum(isinstance(i, Rejected) for i in items) == reader.quarantined
    assert reader.accepted + reader.quarantined == reader.read == len(items)
    return items


def rejected(path, **options):
    """(reason, place) of the rejected rows of a file of which exactly one row is good."""
    items = all_of(read(path, **options))
    assert [i.value for i in items if isinstance(i, Row)] == [Pair("1+1=", "2")]
    bad = [(n, i) for n, i in enumerate(items) if isinstance(i, Rejected)]
    assert all(i.where.startswith(f"{path}, row {n}") for n, i in bad)
    return [
        (i.reason, i.where.removeprefix(f"{path}, ").removeprefix(f"row {n} (").replace(")", "", 1))
        for n, i in bad
    ]


# --- kinds of files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.ndjson", lines(ROWS).rstrip()),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("crlf.jsonl", lines(ROWS).replace(b"\n", b"\r\n")),
        ("array.json", json.dumps(ROWS).encode()),
        ("indented.json", b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=2).encode() + b"\n"),
        ("lines.json", lines(ROWS)),
        ("object.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("by_id.json", json.dumps({f"id{i}": r for i, r in enumerate(ROWS)}, indent=1).encode()),
        ("a.csv", csv_of(ROWS)),
        ("bom.csv", b"\xef\xbb\xbf" + csv_of(ROWS).replace(b"\n", b"\r\n")),
        ("a.tsv", csv_of(ROWS, "\t")),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)),
        ("two_members.jsonl.gz", gzip.compress(lines(ROWS[:3]), mtime=0) + gzip.compress(lines(ROWS[3:]))),
        ("a.json.zst", zstd(json.dumps(ROWS).encode())),
        ("two_frames.jsonl.zst", zstd(lines(ROWS[:3])) + zstd(lines(ROWS[3:]))),
        ("packed_all_the_same.csv", zstd(csv_of(ROWS))),
        ("a.parquet", parquet(ROWS)),
        ("a.arrow", ipc(pa.ipc.new_file, ROWS)),
        ("stream.arrow", ipc(pa.ipc.new_stream, ROWS)),
    ],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    reader = read(path)
    items = all_of(reader)
    assert [i.value for i in items] == NOUNS
    assert [i.raw for i in items] == ROWS
    assert [i.index for i in items] == list(range(7))
    assert reader.format == "xy (columns: x, y)"
    assert [i.value for i in reader] == NOUNS, "a second iteration reads anew"
    assert reader.read == 7


def test_saved_datasets_and_their_splits(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert [i.value for i in all_of(read(tmp_path / "one"))] == NOUNS
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(tmp_path / "many")
    with pytest.raises(DataError, match="several splits"):
        read(tmp_path / "many")
    with pytest.raises(DataError, match="did you mean 'train'"):
        read(tmp_path / "many", split="trian")
    assert [i.value for i in all_of(read(tmp_path / "many", split="test"))] == NOUNS[:1]


def test_a_broken_saved_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a saved dataset"):
        read(tmp_path)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    next(tmp_path.glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="a part of the dataset is missing"):
        read(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="description is broken"):
        read(tmp_path)


def test_the_datasets_library_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_bytes(lines(ROWS))
    assert [i.value for i in all_of(read(f"hf:{tmp_path}/mine"))] == NOUNS
    with pytest.raises(DataError, match="no split 'test'"):
        read(f"hf:{tmp_path}/mine", split="test")
    with pytest.raises(DataError, match="datasets library can't read it"):
        read(f"hf:{tmp_path}/nothing")


def test_without_the_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(YgivenxError, match="'datasets' is not installed"):
        read("hf:gsm8k")


def test_nested_columns_lose_the_nulls_that_arrow_adds(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (tmp_path / "a.parquet").write_bytes(parquet([{"messages": messages}]))
    (row,) = all_of(read(tmp_path / "a.parquet"))
    call["function"]["arguments"] = {"a": 1}
    assert row.value == Conversation((messages[0], {"role": "assistant", "tool_calls": [call]}))


@pytest.mark.parametrize("made", [parquet, partial(ipc, pa.ipc.new_file)])
def test_a_call_has_its_own_arguments_alone_and_a_tool_its_own_parameters(tmp_path, made):
    """In a columnar file an object has every key that another one of its column has, most of them null."""

    def calling(name, **arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]

    def tool(name, **properties):
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    tools = [tool("weather", city={"type": "string"}), tool("clock", zone={"enum": ["WET", None]})]
    rows = [
        {"messages": calling("weather", city="Lisbon"), "tools": tools},
        {"messages": calling("clock", zone="WET")},
    ]
    (tmp_path / "a.arrow").write_bytes(made(rows))
    assert [r.value for r in all_of(read(tmp_path / "a.arrow"))] == [
        Conversation(tuple(rows[0]["messages"]), tools), Conversation(tuple(rows[1]["messages"]))
    ]  # fmt: skip


def test_a_json_object_that_is_itself_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "?"}], "id": 1}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert [i.raw for i in all_of(read(tmp_path / "a.json"))] == [row]


# --- faults of rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"4", "not_an_object"),
        (b"null", "not_an_object"),
        (b'["x", "y"]', "not_an_object"),
        (b'{"x": "1"}', "missing_column"),
        (b'{"x": "1", "y": null}', "wrong_type"),
        (b'{"x": "1", "y": "\\ud800"}', "lone_surrogate"),
        (b'{"x": "1", "x": "2", "y": "3"}', "duplicate_key"),
        (b'{"x": "1", "y": "2", "z": NaN}', "not_a_number"),
        (b'{"x": "1", "y": "2", "z": [-Infinity]}', "not_a_number"),
        (b'{"x": "1", "y": "2", "z": 1e400}', "not_a_number"),
        (b'{"x": "1", "y": "2", "z": ' + b"1" * 5000 + b"}", "not_a_number"),
        (b'{"x": ' + b"[" * 100_000, "too_deep"),
        (b'{"x": "1", "y": "\xff"}', "invalid_utf8"),
        (b'{"x": "1", "y"}', "broken_json"),
        (b'{"x": "1", "y": "2"} {}', "broken_json"),
        (b"\x00", "broken_json"),
        (b'{"x": "' + b"a" * 200_000 + b'", "y": ""}', "too_long"),
    ],
)
def test_a_bad_line_is_rejected_with_its_place(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + line + b"\n" + GOOD)
    assert rejected(path, max_row_bytes=150_000) == [(reason, "line 2" + (", y" if reason in FIELDS else ""))]


FIELDS = {"missing_column", "wrong_type", "lone_surrogate"}


def test_half_a_line_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:-3])
    assert rejected(path) == [("cut_off", "line 2")]


def test_blank_lines_are_counted_apart(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + GOOD + b"\n \t\r\n\n" + GOOD)
    reader = read(tmp_path / "a.jsonl")
    all_of(reader)
    assert (reader.read, reader.blank) == (2, 3)


def test_a_rejected_row_says_what_where_and_why(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None}]}
    path.write_bytes(lines([bad]))
    reader = read(path)
    (item,) = all_of(reader)
    where = f"{path}, row 0 (line 1), messages[1].content"
    assert item == Rejected(bad, "null_content", where, item.message)
    assert item.message.startswith(f"{where}: the content is null or missing\n  why: ")
    assert reader.reasons == {"null_content": 1}
    assert str(reader).endswith("0 accepted + 1 quarantined = 1 read")


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (b"1", "wrong_field_count"),
        (b"1,2,3", "wrong_field_count"),
        (b"\xff,2", "invalid_utf8"),
        (b'"1"a,2', "broken_csv"),
        (b"1\r1,2", "broken_csv"),
        (b'"a,\n' + b"b" * 2000 + b'",2', "too_long"),
    ],
)
def test_a_bad_record_is_rejected(tmp_path, cells, reason):
    path = tmp_path / "a.csv"
    path.write_bytes(b'x,y\n\n"1+1=",2\n' + cells + b"\n")
    assert rejected(path, max_row_bytes=1000) == [(reason, "line 4")]


def test_a_record_over_several_lines_and_one_without_an_end(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'x,y\n"a\nb",c\n"half')
    row, cut = all_of(read(path))
    assert row.value == Pair("a\nb", "c")
    assert (cut.reason, cut.where) == ("cut_off", f"{path}, row 1 (line 4)")
    path.write_bytes(b'x,y\na,b\n"half,c\nd,e\n f,g\nh')
    _, cut = all_of(read(path))
    assert "through 4 lines" in cut.message


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(b'"He said "yes"\nreally",4\n', "broken_csv"), (b'"' + b"b" * 2000 + b'\nreally",4\n', "too_long")],
)
def test_no_row_is_made_of_a_broken_record_s_rest(tmp_path, broken, reason):
    """Where the next record begins is known only if no quote was seen: a cell may go on over the line's end."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"x,y\n" + b"1,2\n" * 30 + broken + b"ok,5\n")
    reader, seen = read(path, max_row_bytes=1000), []
    with pytest.raises(DataError, match=r"records after that can't be found(.|\n)*at line 32"):
        seen += (item for item in reader)
    assert [item.reason for item in seen if isinstance(item, Rejected)] == [reason]
    assert (reader.read, reader.accepted) == (31, 30)
    path.write_bytes(b"x,y\n1,2\n1\r1,2\nok,5\n")
    assert [type(item).__name__ for item in read(path)] == ["Row", "Rejected", "Row"]


def test_arrow_text_that_is_not_utf8_costs_its_row_only(tmp_path):
    bad = pa.array([b"1+1=", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"x": bad, "y": ["2", "2"]}), tmp_path / "a.parquet")
    assert rejected(tmp_path / "a.parquet") == [("unreadable_value", "row 1")]


@pytest.mark.parametrize(
    ("array", "faults"),
    [
        (b"[%s, 4]", [("not_an_object", "row 1")]),
        (b'[NaN, %s, {"x": 1, "x": 2}]', [("not_a_number", "row 0"), ("duplicate_key", "row 2")]),
        (b'[%s, {"x": "\xff"}]', [("invalid_utf8", "row 1")]),
        (b'[%s, {"x": "1", "y', [("cut_off", "row 1")]),
        (b'[%s, {"x": "1", "y": tr', [("cut_off", "row 1")]),
        (b'[%s, {"x": ["1"]', [("cut_off", "row 1")]),
        (b"[%s,", [("cut_off", "row 1")]),
        (b"[%s", [("cut_off", "row 1")]),
    ],
)
def test_bad_elements_of_an_array(tmp_path, array, faults):
    path = tmp_path / "a.json"
    path.write_bytes(array % GOOD)
    assert rejected(path) == faults


# --- faults of files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.json", b'[{"x": "1" "y": "2"}, %s]' % GOOD, "array is broken"),
        ("a.json", b"[%s %s]" % (GOOD, GOOD), "array is broken"),
        ("a.json", b"[%s] %s" % (GOOD, GOOD), "more text after the array"),
        ("a.json", b"[%s, ]" % GOOD, "array is broken"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"x": "%s"}]' % (b"a" * 3_000_000), "longer than 1,000,000 characters"),
        ("a.json", b'{"x": "1",', "not JSON"),
        ("a.json", b'{"x": "\xff"}', "0xff isn't UTF-8"),
        ("a.json", b"4", "neither an array nor an object"),
        ("a.jsonl", lines(ROWS).decode().encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(os.urandom(5000), mtime=0)[:-3000], "can't be read on"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:20] + b"\xff" * 30, "can't be read on"),
        ("a.jsonl.zst", zstd(lines(ROWS))[:-8], "can't be read on"),
        ("a.csv", b"x,x\n1,2\n", "column 'x' occurs twice"),
        ("a.csv", b'"x"y,z\n1,2\n', "header can't be read"),
        ("a.parquet", parquet(ROWS)[:-40], "can't be read on"),
        ("a.arrow", ipc(pa.ipc.new_file, ROWS)[:-40], "can't be read on"),
        ("a.arrow", b"", "can't be read on"),
        ("a.txt", b"x", "unknown kind of file, .txt"),
        ("a", b"x", "without a suffix"),
        ("a.jsonl", lines([{"messages": [], "conversations": []}]), "fit 2 formats"),
    ],
)  # fmt: skip
def test_a_file_that_is_broken_says_so(tmp_path, name, data, what):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=what) as caught:
        all_of(read(path, max_row_bytes=1_000_000))
    assert str(path) in str(caught.value)


def test_rows_before_a_break_are_delivered(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    many = lines([{"x": os.urandom(500).hex(), "y": ""} for _ in range(200)])
    path.write_bytes(gzip.compress(many, mtime=0)[:60_000])
    reader = read(path)
    with pytest.raises(DataError, match=r"after line \d+: the file can't be read on"):
        list(reader)
    assert reader.accepted > 50


def test_names_that_are_not_there(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(ConfigError, match="only datasets have splits"):
        read(tmp_path / "train.jsonl", split="train")
    with pytest.raises(ConfigError, match="limit is -1"):
        read(tmp_path / "train.jsonl", limit=-1)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"4\n5\n"])
def test_a_file_without_an_object_has_no_format(tmp_path, data):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    reader = read(path)
    assert {i.reason for i in all_of(reader)} <= {"not_an_object"}
    assert reader.format == "unknown (no row is an object)"


def test_the_first_rows_decide_together(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'4\n{"id": 1}\n' + GOOD)
    reader = read(path)
    assert reader.format == "xy (columns: x, y; ignored: id)"
    assert [i.reason for i in all_of(reader) if isinstance(i, Rejected)] == [
        "not_an_object",
        "missing_column",
    ]


@pytest.mark.parametrize("limit", [0, 1, 3, 7, 9])
def test_limit_counts_rows_read(tmp_path, limit):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"4\n" + lines(ROWS)[:-1])
    assert len(all_of(read(path, limit=limit))) == min(limit, 8)


def test_reading_does_not_import_torch(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    code = "import sys, ygivenx.rows.data as d; list(d.read(sys.argv[1])); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl")], check=True)


# --- any file at all -------------------------------------------------------------------------------------

TOKENS = [GOOD, b"\n", b",", b"[", b"]", b"{", b"}", b'"', b"x,y\n", b"NaN", b"\\ud800", b"\xef\xbb\xbf"]
KEYS = ["messages", "role", "content", "from", "value", "tools", "x", "y"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)
PIECES = st.binary(max_size=20) | st.sampled_from(TOKENS) | VALUES.map(lambda v: json.dumps(v).encode())
NAMES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.parquet", "a.arrow"]
NAMED = [{}, {"fmt": "messages"}, {"x": "x", "y": "y"}]


@settings(max_examples=int(os.environ.get("YGX_EXAMPLES", "300")), deadline=None)
@given(name=st.sampled_from(NAMES), pieces=st.lists(PIECES, max_size=8), named=st.sampled_from(NAMED))
def test_any_bytes_end_in_rows_or_in_our_own_error(tmp_path_factory, name, pieces, named):
    path = tmp_path_factory.getbasetemp() / f"any-{name}"
    path.write_bytes(b"".join(pieces))
    items = []
    with contextlib.suppress(YgivenxError):  # any other error fails
        items = all_of(read(path, **named))
    assert all(i.reason and str(path) in i.message for i in items if isinstance(i, Rejected))


@settings(max_examples=int(os.environ.get("YGX_EXAMPLES", "100")), deadline=None)
@given(st.lists(st.fixed_dictionaries({"x": st.text(), "y": st.text()}), min_size=1), st.integers(1, 9))
def test_arrays_are_read_the_same_in_any_pieces(tmp_path_factory, rows, chunk):
    # The twin: the json module on the whole text.
    path = tmp_path_factory.getbasetemp() / "pieces.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as m:
        m.setattr("ygivenx.rows.strictjson._CHUNK", chunk)
        assert [i.raw for i in all_of(read(path)) if isinstance(i, Row)] == json.loads(path.read_bytes())


# --- real data -------------------------------------------------------------------------------------------

REAL = {
    "gsm8k/train.jsonl": ({}, 7473, Conversation),
    "gsm8k/test.jsonl": ({}, 1319, Conversation),
    "humaneval/HumanEval.jsonl.gz": ({"x": "prompt", "y": "canonical_solution", "as_text": True}, 164, Pair),
    "fastchat/dummy_conversation.json": ({}, 500, Conversation),
    "llamafactory/alpaca_en_demo.json": ({}, 999, Conversation),
    "llamafactory/alpaca_zh_demo.json": ({}, 1000, Conversation),
    "llamafactory/identity.json": ({}, 91, Conversation),
    "llamafactory/glaive_toolcall_en_demo.json": ({}, 300, Conversation),
    "llamafactory/reason_tool_use_demo_50.jsonl": ({}, 50, Conversation),
    "llamafactory/v1_sft_demo.jsonl": ({}, 500, Conversation),
}
# Nested, or without an answer: refused for that, and every row is quarantined when x and y are forced.
OTHERS = {
    "self_instruct/seed_tasks.jsonl": ("alpaca lacks 'output'", ("instruction", "instances"), 175),
    "self_instruct/user_oriented_instructions.jsonl": (
        "alpaca lacks 'output'",
        ("instruction", "instances"),
        252,
    ),
    "fastchat/question.jsonl": ("no known format", ("question_id", "turns"), 80),
    "fastchat/gpt-4.jsonl": ("no known format", ("question_id", "choices"), 30),
    "bfcl/BFCL_v4_multiple.json": ("question_answer lacks 'answer'", ("question", "function"), 200),
    "bfcl/BFCL_v4_parallel.json": ("question_answer lacks 'answer'", ("question", "function"), 200),
    "bfcl/possible_answer/BFCL_v4_multiple.json": ("no known format", ("id", "ground_truth"), 200),
    "bfcl/possible_answer/BFCL_v4_parallel.json": ("no known format", ("id", "ground_truth"), 200),
    "xquad/xquad.en.json": ("no known format", ("title", "paragraphs"), 48),
    "xquad/xquad.zh.json": ("no known format", ("title", "paragraphs"), 48),
    "xquad/xquad.ar.json": ("no known format", ("title", "paragraphs"), 48),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_is_accepted_whole(data_dir, name):
    options, rows, noun = REAL[name]
    items = all_of(read(data_dir / name, **options))
    assert len(items) == rows
    assert {type(i.value) for i in items} == {noun}


@pytest.mark.parametrize("name", OTHERS)
def test_real_data_of_another_shape_is_refused_and_counted(data_dir, name):
    why, (x, y), rows = OTHERS[name]
    with pytest.raises(DataError, match=why):
        read(data_dir / name)
    items = all_of(read(data_dir / name, x=x, y=y))
    assert {i.reason for i in items} == {"wrong_type"}
    assert len(items) == rows


def test_real_typed_parts_lose_nothing(data_dir):
    for row in read(data_dir / "llamafactory/reason_tool_use_demo_50.jsonl"):
        for before, after in zip(row.raw["messages"], row.value.messages, strict=True):
            parts = {}
            for part in before["content"]:
                parts.setdefault(part["type"], []).append(part["value"])
            assert after["content"] == "".join(parts.get("text", []))
            assert after.get("reasoning_content", "") == "".join(parts.get("reasoning", []))
            calls = [c["function"] for c in after.get("tool_calls", [])]
            assert calls == [json.loads(v) for v in parts.get("tool_call", [])]
        assert row.value.tools == (json.loads(row.raw["tools"]) or None)


def test_real_weights_are_kept(data_dir):
    row = next(iter(read(data_dir / "llamafactory/v1_sft_demo.jsonl")))
    assert [m["weight"] for m in row.value.messages] == [0.0, 1.0]


# --- memory ----------------------------------------------------------------------------------------------


def write_many(path, megabytes):
    """A file of rows of 1 KiB: one a line, or an array."""
    row = json.dumps({"x": "a" * 1000, "y": "b"}).encode()
    array = path.suffix == ".json"
    with path.open("wb") as f:
        f.write(b"[" + row if array else row)
        for _ in range(megabytes * 1024 - 1):
            f.write((b",\n" if array else b"\n") + row)
        f.write(b"]" if array else b"\n")


def peak_of(path):
    """Peak of Python's memory while reading, bytes."""
    tracemalloc.start()
    reader = read(path)
    for _ in reader:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.accepted == reader.read
    return peak


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    path = tmp_path / name
    peaks = []
    for megabytes in (4, 12):
        write_many(path, megabytes)
        peaks.append(peak_of(path))
    assert peaks[1] < 6 << 20
    assert peaks[1] < 1.2 * peaks[0]


def test_a_line_over_the_limit_is_never_held(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": "' + b"a" * (20 << 20) + b'"}\n' + GOOD)
    tracemalloc.start()
    items = list(read(path, max_row_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [getattr(i, "reason", "ok") for i in items] == ["too_long", "ok"]
    assert peak < 6 << 20


@pytest.mark.full
def test_200_megabytes_in_flat_memory(tmp_path):
    write_many(tmp_path / "a.jsonl", 200)
    code = (
        "import resource, sys; from ygivenx.rows.data import read\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "r = read(sys.argv[1]); rows = iter(r); next(rows); before = peak(); [None for _ in rows]\n"
        "assert r.accepted == 200 * 1024, r.read\n"
        "assert peak() - before < 20, f'{peak() - before:.0f} MiB more'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl")], check=True)
