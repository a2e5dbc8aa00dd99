"""Other ways in which the same rows may be rendered: modes of inference, and rows that the contract refuses."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..encoder.encode import Encoder
from ..rows.data import Row
from ..sequence import Example, Rejected
from ..templating.template import Template
from .evidence import MODE, UNPROVEN

_SWITCH = re.compile("think|reason")
_EFFORT = re.compile("effort")
# With these the encoder takes what it refuses: nothing of it is proven, but each token has its kind.
LENIENT = {
    "control": "parse",
    "border": "split",
    "context": "rendered",
    "repair": "all",
    "dropped": "warn",
    "max_length": None,
}


def numbered(rows: Iterable[Any]) -> Iterator[Row | Rejected]:
    """Rows with their numbers; what a reader gives has them already."""
    for n, row in enumerate(rows):
        yield row if isinstance(row, Row | Rejected) else Row(n, f"row {n}", row, row)


@lru_cache(maxsize=4)
def modes_of(encoder: Encoder) -> dict[str, Encoder]:
    """An encoder for each value of each switch that the template reads and this encoder leaves open."""
    source = encoder.tokenizer.chat_template
    if not isinstance(source, str):
        return {}
    given = encoder.options["template_kwargs"] or {}
    modes = {}
    for name in sorted(Template(source).undeclared - given.keys()):
        values = ("low", "medium", "high") if _EFFORT.search(name) else (False, True)
        if _SWITCH.search(name):
            for value in values:
                modes[f"{name}={value}"] = encoder.variant(template_kwargs={**given, name: value})
    return modes


def refused_rows(rows: Iterable[Any], accepted: Container[int], encoder: Encoder) -> list[Example]:
    """Examples of rows that the encoder refused, as it takes them leniently; their sequences are noted as unproven.

    accepted: the numbers of those that it took.
    """
    again = [r for r in rows if isinstance(r, Row) and r.index not in accepted]
    examples, _ = encoder.variant(**LENIENT).batch(again) if again else ([], [])
    return [noted(e, UNPROVEN) for e in examples]


def in_modes(row: Row, modes: dict[str, Encoder]) -> Iterator[Example]:
    """A row in each mode that takes it."""
    for name, encoder in modes.items():
        examples, _ = encoder.batch([row])
        yield from (noted(e, MODE + name) for e in examples)


def noted(example: Example, note: str) -> Example:
    """The example with a note on each of its sequences."""
    return replace(
        example, sequences=tuple(replace(s, notes=(*s.notes, note)) for s in example.sequences), row=None
    )
