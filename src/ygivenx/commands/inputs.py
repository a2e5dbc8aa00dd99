"""What every command begins with: a model, an encoder, rows; and the account of the rows, said aloud."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from rich.console import Console

from ..errors import ConfigError, nearest
from ..show import visible

console = Console(stderr=True)


def say(text: str, to: Console | None = None) -> None:
    """Print what may quote a row: as it stands, but for what a terminal would obey."""
    (to or console).print(visible(text), highlight=False, markup=False, soft_wrap=True)


def open_model(model: str, gguf_file: str | None, dtype: str) -> tuple[Any, Any]:
    import torch

    from ..head.edges import multiplies
    from ..models.memory import keep_freed_memory
    from ..models.model import load

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"unknown dtype {dtype!r}", fix="float32, bfloat16 or float16")
    keep_freed_memory()
    with console.status("loading the model"):
        loaded = load(model, gguf_file=gguf_file, dtype=getattr(torch, dtype))
    if loaded[0].device.type == "cpu" and not multiplies(loaded[0].dtype):
        console.print(f"[yellow]this CPU has no products in {dtype}: float32 takes a fraction of the time[/]")
    return loaded


def open_encoder(model: str, gguf_file: str | None, **options: Any) -> Any:
    from ..encoder.encode import Encoder

    with console.status("loading the tokenizer"):
        encoder = Encoder.from_pretrained(model, gguf_file=gguf_file, **options)
    if encoder.dated:
        told = encoder.now.isoformat(timespec="seconds")
        say(f"the chat template writes the time: it is taken to be {told} (--encoder now={told})")
    return encoder


def encoder_options(named: Iterable[str] | None, **further: Any) -> dict[str, Any]:
    """Options of Encoder from `name=value`; a value is JSON where it can be, else text. Raises ConfigError."""
    told: dict[str, Any] = {}
    for option in named or ():
        name, given, value = option.partition("=")
        if not given:
            raise ConfigError(f"--encoder {option}: no value", fix="name=value, such as repair=append_end")
        try:
            told[name] = json.loads(value)
        except json.JSONDecodeError:
            told[name] = value
    check_options(told, "--encoder")
    return {**further, **told}


def check_options(told: Iterable[str], where: str) -> None:
    """Raise ConfigError for a name that is no option of Encoder, or one that commands have a flag for."""
    from ..encoder.encode import OPTIONS

    for name in told:
        if name not in OPTIONS:
            what = f"unknown option of the encoder {name!r}{nearest(str(name), OPTIONS)}"
            raise ConfigError(what, where=where, fix=f"known: {', '.join(OPTIONS)}")


def open_rows(
    data: str,
    fmt: str | None,
    x: str | None,
    y: str | None,
    plain: bool,
    limit: int | None,
    split: str | None = None,
) -> Any:
    from ..rows.data import read

    return read(data, fmt=fmt, x=x, y=y, as_text=plain, limit=limit, split=split)


def encoded(reader: Any, encoder: Any) -> Iterator[Any]:
    """An Example or a Rejected per row read; what the reader quarantined passes through."""
    from ..sequence import Rejected

    for chunk in _chunks(reader, 256):
        examples, rejected = encoder.batch([r for r in chunk if not isinstance(r, Rejected)])
        yield from (r for r in chunk if isinstance(r, Rejected))
        yield from examples
        yield from rejected


def _chunks(items: Any, size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class Accepted:
    """Iterates over the examples that a reader's rows became, and keeps count of what was rejected.

    items: an Example or a Rejected per row of the reader, as from `encoded`.
    """

    def __init__(self, reader: Any, items: Iterable[Any]) -> None:
        self.reader, self.items = reader, items
        self.accepted, self.reasons, self.first = 0, Counter[str](), ""

    def __iter__(self) -> Iterator[Any]:
        from ..sequence import Rejected

        for item in self.items:
            if isinstance(item, Rejected):
                self.reasons[item.reason] += 1
                self.first = self.first or item.message
            else:
                self.accepted += 1
                yield item

    def account(self) -> dict[str, Any]:
        """Accepted + quarantined = read; said aloud too."""
        quarantined = self.reasons.total()
        account = {
            "format": self.reader.format,
            "read": self.accepted + quarantined,
            "accepted": self.accepted,
            "quarantined": quarantined,
            "reasons": dict(self.reasons.most_common()),
        }
        say_account(account, self.first)
        return account


def take(reader: Any, encoder: Any) -> tuple[list[Any], dict[str, Any]]:
    """All examples of a reader, and the account of its rows."""
    accepted = Accepted(reader, encoded(reader, encoder))
    examples = list(accepted)
    return examples, accepted.account()


def say_account(account: dict[str, Any], first: str) -> None:
    say(f"format: {account['format']}")
    say(
        f"{account['accepted']:,} accepted + {account['quarantined']:,} quarantined = {account['read']:,} read"
    )
    for reason, count in account["reasons"].items():
        say(f"  {count:>7,}  {reason}")
    if first:
        say(f"first of them: {first}")


def the_row(reader: Any, encoder: Any, number: int) -> Any:
    """The example of one row; raises what the row was quarantined for."""
    from ..sequence import Rejected

    item = next(islice(reader, number, number + 1), None)
    if item is None:
        raise ConfigError(f"there is no row {number}", where=reader.name, fix="--row counts from 0")
    if isinstance(item, Rejected):
        raise ConfigError(f"row {number} is quarantined ({item.reason})", why=item.message)
    return encoder(item)
