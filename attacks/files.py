"""Faults at every call of the file system while `ygx score` and `ygx encode` write, and while encoded rows are kept.

After each the command is run again as it was: what it writes is what an undisturbed run writes. A file under its final
name is whole in between: scores in JSON Lines, which grow, begin like those of the undisturbed run.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .faulty import Work, attacked, preloaded
from .resume import TESTS

CASES = {
    "ygx score, JSON Lines": ("score", "out.jsonl", ("--tokens",)),
    "ygx score, Parquet": ("score", "out.parquet", ()),
    "ygx encode, Parquet": ("encode", "out.parquet", ("--overwrite",)),
    "ygx encode --to trl, JSON Lines": ("encode", "out.jsonl", ("--overwrite", "--to", "trl")),
    "ygx encode --to verl, Parquet": ("encode", "out.parquet", ("--overwrite", "--to", "verl")),
}
ROWS = [{"x": f"{i} + {i} = ", "y": str(2 * i)} for i in range(6)] + [{"x": 5}]


def ygx(*arguments: str) -> None:
    """Run a command in this process; raises SystemExit with its code where that isn't 0."""
    from ygivenx.cli import main

    sys.argv = ["ygx", *arguments]
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise


def records(path: Path) -> list[Any]:
    """What a file holds, as plain values."""
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(one: Any, other: Any) -> bool:
    """Whether values are equal, numbers but for rounding: rows are scored together with others after an interruption."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def writing(command: str, name: str, options: tuple[str, ...], rows: Path, model: Path) -> Work:
    """A command that writes one file, attacked from its beginning."""

    def write(folder: Path) -> None:
        arguments = ("--model", str(model), "-o", str(folder / name), *options)
        ygx(command, str(rows), *arguments, "--quarantine", str(folder / "bad.jsonl"))

    with tempfile.TemporaryDirectory() as straight:
        write(Path(straight))
        expected = records(Path(straight) / name)
        refused = len(records(Path(straight) / "bad.jsonl"))
    grows = command == "score" and name.endswith(".jsonl")

    def right(folder: Path) -> str:
        if (folder / name).exists() and not grows and not same(records(folder / name), expected):
            return "a file under its final name isn't whole"
        write(folder)
        if not same(records(folder / name), expected):
            return "other records afterwards"
        return "" if len(records(folder / "bad.jsonl")) == refused else "other quarantined rows afterwards"

    return Work(lambda folder: None, write, right)


def keeping(rows: Path, model: Path) -> Work:
    """Encoded rows that `ygx train` keeps for the next run: those of a cache are what was encoded."""
    from rich.console import Console

    from ygivenx.commands.config import DataSection
    from ygivenx.commands.encoding import kept_rows
    from ygivenx.encoder.encode import Encoder

    encoder = Encoder.from_pretrained(str(model))

    def digests(folder: Path) -> list[bytes]:
        data = DataSection(cache=str(folder), processes=1)
        found, account = kept_rows([str(rows)], data, encoder, Console(quiet=True))
        assert account["accepted"] + account["quarantined"] == len(ROWS)
        return list(found.digest.tolist())

    with tempfile.TemporaryDirectory() as straight:
        expected = digests(Path(straight))
    return Work(
        lambda folder: None, digests, lambda f: "" if digests(f) == expected else "other rows afterwards"
    )


def loaded_once(model: Path) -> None:
    """The commands get the model and its encoder from this process, instead of loading them again each time."""
    from ygivenx import Encoder, cli, load
    from ygivenx.commands import scorerun

    made, encoder = load(str(model)), Encoder.from_pretrained(str(model))
    scorerun.open_model = lambda *_, **__: made
    cli.open_encoder = lambda *_, **__: encoder


def run(scale: float = 1.0, only: str = "") -> dict[str, Any]:
    """Counts of outcomes; `bad` lists what was lost, silent, or an error that isn't ours."""
    return preloaded("files", scale, only)


def outcomes(scale: float, only: str) -> dict[str, Any]:
    """`run` in a process that `faults.c` is loaded into."""
    sys.path.insert(0, str(TESTS))
    from tiny import llama

    from .forged import tokenizer_of

    found: dict[str, Any] = {}
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        model, rows = Path(folder) / "model", Path(folder) / "rows.jsonl"
        tokenizer = tokenizer_of("smollm2")
        tokenizer.save_pretrained(model)
        llama(vocab_size=len(tokenizer)).save_pretrained(model)
        rows.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
        loaded_once(model)
        works: dict[str, Callable[[], Work]] = {
            name: lambda case=case: writing(*case, rows, model) for name, case in CASES.items()
        }
        works["encoded rows that are kept"] = lambda: keeping(rows, model)
        for name, work in ((n, w) for n, w in works.items() if only in n):
            found[name], worse = attacked(work(), scale)
            bad += [f"{name}: {b}" for b in worse]
    return {"outcomes": found, "bad": bad}


if __name__ == "__main__":
    import logging

    logging.disable(logging.WARNING)
    print(json.dumps(outcomes(float(sys.argv[1]), sys.argv[2])))
