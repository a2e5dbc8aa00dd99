"""What every command begins with: a model, an encoder, rows; and the account of the rows."""

from __future__ import annotations

import json
import os
import re
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..disk import writing
from ..errors import ConfigError
from ..rows.data import Reader, Row, read
from ..sequence import Example, Rejected
from ..show import visible
from .config import ColumnOptions, EncoderSection, LimitedRowOptions, ModelOptions
from .quiet import quiet

if TYPE_CHECKING:
    from ..encoder.encode import Encoder

console = Console(stderr=True)


def say(text: str, to: Console | None = None) -> None:
    """Print what may quote a row: as it stands, but for what a terminal would obey."""
    (to or console).print(visible(text), highlight=False, markup=False, soft_wrap=True)


def open_model(source: ModelOptions, dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer), in this dtype by torch's name."""
    import torch

    from ..head.edges import has_products
    from ..models.memory import keep_freed_memory
    from ..models.model import load

    keep_freed_memory()
    with console.status("loading the model"), quiet(source.verbose):
        loaded = load(
            str(source.path),
            gguf_file=source.gguf_file,
            dtype=getattr(torch, dtype),
            trust_remote_code=source.trust_remote_code,
        )
    if loaded[0].device.type == "cpu" and not has_products(loaded[0].dtype):
        console.print(f"[yellow]this CPU has no products in {dtype}: float32 takes a fraction of the time[/]")
    return loaded


def options_of(section: EncoderSection) -> dict[str, Any]:
    """The section as arguments of Encoder."""
    named = {name: getattr(section, name) for name in ("train", "control", "max_length", "overflow")}
    return {**named, **section.further}


def open_encoder(source: ModelOptions, section: EncoderSection, **options: Any) -> Encoder:
    """The encoder of a model; what the section says of `options` counts."""
    from ..encoder.encode import Encoder

    with console.status("loading the tokenizer"), quiet(source.verbose):
        encoder = Encoder.from_pretrained(
            str(source.path),
            gguf_file=source.gguf_file,
            trust_remote_code=source.trust_remote_code,
            **{**options, **options_of(section)},
        )
    if encoder.writes_time:
        now = encoder.now.isoformat(timespec="seconds")
        say(f"the chat template writes the time: it is taken to be {now} (--encoder now={now})")
    return encoder


def open_rows(data: str, columns: ColumnOptions, limit: int | None = None) -> Reader:
    """The rows of a file; `limit` counts where the columns bring none."""
    if isinstance(columns, LimitedRowOptions):
        limit = columns.limit
    return read(
        data,
        fmt=columns.format,
        x=columns.x,
        y=columns.y,
        as_text=columns.plain,
        limit=limit,
        split=columns.split,
        roles=tuple((columns.roles or "").replace(",", " ").split()),
        max_row_bytes=columns.max_row_bytes,
    )


@dataclass
class Account:
    """What became of the rows: accepted + quarantined = read. Notes on accepted ones are counted by kind.

    quarantine: a file that gets each rejected row with its reason, as JSON Lines.
    """

    format: str
    quarantine: str | None = None
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # the first message of each reason
    notes: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)  # by max_length: rows, tokens, trained tokens
    examples: dict[str, str] = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack)
    _file: Any = None

    def accept(self, example: Example | None = None) -> None:
        """Count an accepted row and what its sequences note."""
        self.accepted += 1
        tokens, trained = (sum(s.cut[n] for s in example or ()) for n in (0, 1))
        self.cut.update({"rows": 1, "tokens": tokens, "trained": trained} if tokens else {})
        for note in dict.fromkeys(n for s in example or () for n in s.notes):
            # Notes that differ in numbers alone are of one kind; without that each row would have its own.
            kind = re.sub(r"\d+", "N", note)
            self.notes[kind] += 1
            self.examples.setdefault(kind, f"row {example.index}: {note}" if example else note)

    def reject(self, row: Rejected) -> None:
        """Count a quarantined row, and write it down where that is asked for."""
        self.reasons[row.reason] += 1
        self.first.setdefault(row.reason, row.message)
        if self.quarantine:
            self._file = self._file or self._open.enter_context(quarantine_file(self.quarantine))
            record = {"reason": row.reason, "where": row.where, "message": row.message, "row": row.row}
            with writing(Path(self.quarantine)):
                self._file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")

    @property
    def read(self) -> int:
        """How many rows were read: accepted + quarantined."""
        return self.accepted + self.reasons.total()

    def add(self, other: Account) -> None:
        """Count what another one has counted of further rows."""
        formats = [f for f in (self.format, other.format) if f]
        self.format, self.first = "; ".join(dict.fromkeys(formats)), {**other.first, **self.first}
        self.accepted += other.accepted
        self.reasons.update(other.reasons)
        self.notes.update(other.notes)
        self.cut.update(other.cut)
        self.examples = {**other.examples, **self.examples}

    def kept(self) -> dict[str, Any]:
        """Plain types, from which `of` makes it again."""
        return {**self.document(), "first": self.first, "examples": self.examples}

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Account:
        """From what `kept` gave."""
        counts: dict[str, Any] = {name: Counter(kept[name]) for name in ("reasons", "notes", "cut")}
        return cls(**{name: kept[name] for name in ("format", "accepted", "first", "examples")}, **counts)

    def document(self) -> dict[str, Any]:
        """Plain types: the counts."""
        return {
            "format": self.format,
            "read": self.read,
            "accepted": self.accepted,
            "quarantined": self.reasons.total(),
            "reasons": dict(self.reasons.most_common()),
            "notes": dict(self.notes.most_common()),
            "cut": dict(self.cut),
        }

    def end(self) -> None:
        """Close the file, on the disk with all that was written."""
        self._open.close()

    def close(self) -> dict[str, Any]:
        """Print the counts and close the file; the same as a document."""
        self.end()
        document = self.document()
        say_account(document, self.first, self.examples)
        if self.quarantine and document["quarantined"]:
            say(f"quarantined rows: {self.quarantine}")
        return document


@contextmanager
def quarantine_file(path: str) -> Iterator[Any]:
    """A file for rejected rows, flushed to disk when it is closed. Raises ConfigError, or DataError at its end."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError("it can't be written", where=f"--quarantine {path}", why=str(error)) from error
    with writing(Path(path)), file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def say_account(
    account: dict[str, Any], first: dict[str, str], examples: dict[str, str] | None = None
) -> None:
    """Print the counts of an account, the first row of each reason, and one row for each kind of note."""
    say(f"format: {account['format']}")
    say(
        f"{account['accepted']:,} accepted + {account['quarantined']:,} quarantined = {account['read']:,} read"
    )
    for reason, count in account["reasons"].items():
        example = in_flags(first.get(reason, "")).replace("\n", "\n" + 11 * " ")
        say(f"  {count:>7,}  {reason}" + (f", such as {example}" if example else ""))
    if cut := account.get("cut"):
        lost = f"{cut['tokens']:,} tokens, {cut['trained']:,} of them trained"
        say(f"  {cut['rows']:>7,}  cut to fit max_length: {lost}")
    for kind, count in account.get("notes", {}).items():
        say(f"  {count:>7,}  accepted with a note, such as {(examples or {}).get(kind, kind)}")


def the_row(reader: Reader, encoder: Any, number: int) -> Example:
    """The example of one row; raises what the row was quarantined for."""
    example: Example = encoder(row_of(reader, number))
    return example


def row_of(reader: Reader, number: int) -> Row:
    """One row as it was read; raises what it was quarantined for."""
    item = next(islice(reader, number, number + 1), None)
    if item is None:
        raise ConfigError(f"there is no row {number}", where=reader.name, fix="--row counts from 0")
    if isinstance(item, Rejected):
        raise ConfigError(f"row {number} is quarantined ({item.reason})", why=item.message)
    return item


# Options of Encoder and of `read` that commands have a flag for; the others are names of --encoder.
_FLAGS = {
    name: "--" + name.replace("_", "-")
    for name in ("control", "train", "max_length", "overflow", "roles", "max_row_bytes")
}
_FIX = re.compile(r"(^ *|\()fix: .*", re.MULTILINE)
# An option with a literal, as fixes have it: name='text', name=[...], name={...}, a number, True or False.
_IN_PYTHON = re.compile(r"""\b([a-z_]+)=('[^']*'|"[^"]*"|\[[^\]]*\]|\{[^}]*\}|\d+\b|True\b|False\b)""")


def in_flags(text: str) -> str:
    """A message whose fixes name options as Python does, in the spelling of commands.

    `dropped='warn'` becomes `-e dropped=warn`, `control="text"` `--control text`, and `stops=['<|end|>']`
    `-e 'stops=["<|end|>"]'`.
    """
    return _FIX.sub(lambda fix: _IN_PYTHON.sub(_in_flags, fix[0]), text)


def _in_flags(match: re.Match[str]) -> str:
    from ..encoder.encode import OPTIONS

    name, value = match[1], literal_eval(match[2])
    if name in _FLAGS:
        return f"{_FLAGS[name]} {quote(','.join(value) if isinstance(value, list) else str(value))}"
    as_text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"-e {quote(f'{name}={as_text}')}" if name in OPTIONS else match[0]
