"""Random inputs: files of rows, options of commands, configs, and sealed checkpoints. Errors are ours, and rows add up.

The cases are hypothesis's. `python -m attacks.fuzz NAME` runs one of them under atheris instead, if that is installed:
its inputs then follow the code that they reach.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ygivenx.errors import YgivenxError

CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
ROWS: list[dict[str, Any]] = [
    CHAT, {"x": "2+2=", "y": "4"}, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"input_ids": [1, 2], "labels": [-100, 2]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "documents": [{"text": "x"}]},
    {"instruction": "a", "input": "", "output": "b"},
]  # fmt: skip
WORDS = (
    "{",
    "}",
    "[",
    "]",
    '"',
    ",",
    ":",
    "\\",
    "\\u",
    "null",
    "NaN",
    "1e999",
    "\0",
    "\ufeff",
    "\ud800",
    "\n",
    "\r",
    "é",
    "9" * 50,
)


def seeds() -> dict[str, bytes]:
    """A small file of each kind by its suffix."""
    kinds = [[r, r] for r in ROWS]
    lines = ["\n".join(json.dumps(r) for r in rows).encode() for rows in kinds]
    found = {f"{n}.jsonl": data for n, data in enumerate(lines)}
    found |= {f"{n}.json": json.dumps(rows).encode() for n, rows in enumerate(kinds)}
    found |= {"a.csv": b'x,y\n1,2\n"a,b",c\n', "a.tsv": b"x\ty\n1\t2\n"}
    for n, rows in enumerate(kinds):
        table, parquet, arrow = pa.Table.from_pylist(rows), io.BytesIO(), io.BytesIO()
        pq.write_table(table, parquet)
        with pa.ipc.new_file(arrow, table.schema) as writer:
            writer.write_table(table)
        found |= {f"{n}.parquet": parquet.getvalue(), f"{n}.arrow": arrow.getvalue()}
    return found


SEEDS = seeds()
EDIT = st.tuples(
    st.integers(0, 1 << 16), st.integers(0, 8), st.one_of(st.binary(max_size=9), st.sampled_from(WORDS))
)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip


def edited(data: bytes, edits: list[tuple[int, int, Any]]) -> bytes:
    """Each edit puts bytes in the place of some that were there."""
    for at, length, new in edits:
        at %= len(data) + 1
        text = new.encode("utf-8", "surrogatepass") if isinstance(new, str) else new
        data = data[:at] + text + data[at + length :]
    return data


@given(st.sampled_from(sorted(SEEDS)), st.lists(EDIT, max_size=4))
def reader(name: str, edits: list[Any]) -> None:
    """A file with some bytes changed."""
    from ygivenx.rows.data import read

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(edited(SEEDS[name], edits))
        rows = read(path)
        count = sum(1 for _ in rows)
        assert rows.accepted + rows.quarantined == rows.read == count


@given(st.sampled_from(ROWS), st.lists(st.tuples(st.integers(0, 99), VALUE), max_size=3))
def row(base: dict[str, Any], changes: list[tuple[int, Any]]) -> None:
    """A row with some of its values, at any depth, replaced by others; it is read and encoded."""
    from ygivenx.rows.formats import normalise

    changed = json.loads(json.dumps(base))
    for at, value in changes:
        places = list(_places(changed))
        container, key = places[at % len(places)]
        container[key] = value
    encoder()(normalise(changed))


def _places(value: Any) -> Any:
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


_encoders: list[Any] = []


def encoder() -> Any:
    """One of the sample's, made once."""
    if not _encoders:
        from ygivenx import Encoder

        from .forged import tokenizer_of

        _encoders.append(Encoder(tokenizer_of("smollm2")))
    return _encoders[0]


def _keys() -> dict[str, list[str]]:
    from dataclasses import fields

    from ygivenx.commands.config import SECTIONS

    return {name: [f.name for f in fields(section)] for name, section in SECTIONS.items()}


@given(st.data())
def config(data: Any) -> None:
    """A file of `ygx train` with known and unknown keys, and any values."""
    from ygivenx.commands.config import TrainConfig

    document: dict[str, Any] = {}
    keys = _keys()
    for section in data.draw(st.lists(st.sampled_from(sorted(keys)), max_size=3, unique=True)):
        names = st.one_of(st.sampled_from(keys[section]), st.text(max_size=9))
        document[section] = data.draw(st.one_of(st.dictionaries(names, VALUE, max_size=4), VALUE))
    text = edited(yaml.safe_dump(document).encode(), data.draw(st.lists(EDIT, max_size=2)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_bytes(text)
        TrainConfig.of(path, {})


COMMANDS = (
    "show",
    "score",
    "encode",
    "audit",
    "train",
    "ledger",
    "pack",
    "probe",
    "generate",
    "merge",
    "compare",
)


@given(st.data())
def options(data: Any) -> None:
    """A command line of known flags with odd values; it ends with 0, 1 or 2, without a traceback."""
    import typer

    from ygivenx.cli import app, main

    command = data.draw(st.sampled_from(COMMANDS))
    known = {c.name: c for c in typer.main.get_command(app).commands.values()}[command]  # type: ignore[attr-defined]
    flags = sorted(f for p in known.params for f in p.opts if f.startswith("-"))
    odd = st.one_of(
        st.text(max_size=12),
        st.sampled_from(["", "-1", "0", "nan", "1e99", "x=", "=", "a=b", "/", "hf:", "\0", "["]),
    )
    arguments = data.draw(st.lists(st.one_of(st.sampled_from(flags), odd), max_size=6))
    arguments = [a for a in arguments if a not in ("--verbose",)]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(json.dumps(CHAT) + "\n")
        # A model that isn't there: what is wrong with the options is found before, or that it isn't there.
        line = [command, str(rows), *arguments, "--model", f"{folder}/none"]
        sys.argv, out, code = ["ygx", *line], io.StringIO(), 0
        try:
            with redirect_stdout(out), redirect_stderr(out):
                main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        assert code in (0, 1, 2), (line, code)
        assert "Traceback (most" not in out.getvalue(), (line, out.getvalue()[-600:])


_checkpoints: list[Any] = []


def _checkpoint() -> dict[str, bytes]:
    """The files of a checkpoint after step 2 of 3, made once."""
    if not _checkpoints:
        from .resume import TESTS, trainer

        sys.path.insert(0, str(TESTS))
        with tempfile.TemporaryDirectory() as folder:
            trainer(Path(folder), 2, {}).train()
            files = (Path(folder) / "checkpoint-2").iterdir()
            _checkpoints.append({p.name: p.read_bytes() for p in files})
    return dict(_checkpoints[0])


@given(st.data())
def sealed(data: Any) -> None:
    """A checkpoint of which a file was changed before it was sealed: it is loaded, or refused in an error of ours."""
    from ygivenx.training import checkpoint

    from .resume import trainer

    files = _checkpoint()
    name = data.draw(st.sampled_from(sorted(set(files) - {checkpoint.MANIFEST})))
    files[name] = edited(files[name], data.draw(st.lists(EDIT, min_size=1, max_size=3)))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoint-2"
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content)
        checkpoint.seal(place)
        trainer(Path(folder), 3, {}).train(resume_from_checkpoint="auto")


TARGETS: dict[str, tuple[Callable[..., None], int]] = {
    "reader": (reader, 20_000), "row": (row, 20_000), "config": (config, 5000), "options": (options, 1500), "sealed": (sealed, 400),
}  # fmt: skip


def run(scale: float = 1.0, only: str = "") -> dict[str, Any]:
    """How many inputs of each kind ended how; `bad` has an error that isn't ours, with the smallest such input."""
    counts, bad = {}, []
    for name, (target, count) in TARGETS.items():
        if only not in name:
            continue
        outcomes = Counter[str]()
        given = settings(
            max_examples=max(5, round(count * scale)), deadline=None, database=None, print_blob=False,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink], derandomize=True,
        )(counted(target, outcomes))  # fmt: skip
        try:
            given()
        except BaseException:
            bad.append(f"{name}: {traceback.format_exc()[-1500:]}")
        counts[name] = dict(outcomes)
    return {"outcomes": counts, "bad": bad}


def counted(target: Any, outcomes: Counter[str]) -> Any:
    """The target as hypothesis knows it; an error of ours is an outcome."""
    inner = target.hypothesis.inner_test

    def tried(*args: Any, **kwargs: Any) -> None:
        try:
            inner(*args, **kwargs)
            outcomes["accepted"] += 1
        except YgivenxError:
            outcomes["an error of ours"] += 1

    target.hypothesis.inner_test = tried
    return target


def main() -> None:
    import importlib

    import atheris

    with atheris.instrument_imports(include=["ygivenx"]):
        for name in ("rows.data", "rows.formats", "encoder.encode", "commands.config"):
            importlib.import_module(f"ygivenx.{name}")
    target, _ = TARGETS[sys.argv[1]]
    given = settings(deadline=None, database=None)(counted(target, Counter()))
    atheris.Setup([sys.argv[0], *sys.argv[2:]], given.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
