"""`ygx compare`: what other trainers make of rows, on the terminal, as JSON, or as a page."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from ..compare.comparing import compare, in_terminal, strip
from ..compare.trainers import trainer_of
from ..rows.data import Row
from ..show import visible_json
from .config import ColumnOptions, EncoderSection, ModelOptions
from .inputs import open_encoder, open_rows, say


def compared(
    data: str, source: ModelOptions, columns: ColumnOptions, section: EncoderSection, trainers: str, limit: int,
    settings: list[str] | None, html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print each cell as it comes, and write the page."""
    places = places_of(trainers)
    reader = open_rows(data, columns)
    say(f"format: {reader.format}")
    rows = list(islice((r for r in reader if isinstance(r, Row)), limit))
    encoder = open_encoder(source, section)
    cells = []
    for cell in compare(rows, encoder, places, settings):
        cells.append(cell)
        if not as_json:
            print(in_terminal(cell, encoder.tokenizer), end="\n\n")
    if as_json:
        names = ("row", "trainer", "setting", "error")
        records = [
            {n: getattr(c.result, n) for n in names}
            | {"outcome": c.outcome, "ids": c.result.ids.tolist(), "weights": c.result.weights.tolist()}
            for c in cells
        ]
        print(visible_json(json.dumps(records, ensure_ascii=False)))
    if html is not None:
        from ..report import Page

        by_row = sorted(cells, key=lambda c: c.result.row)
        Page(title="Who trains what", rows=[strip(c, encoder.tokenizer) for c in by_row]).write(html)


def places_of(trainers: str) -> dict[str, str]:
    """NAME or NAME=PLACE, separated by commas, as a mapping; raises ConfigError for a name that isn't known."""
    pairs = [part.partition("=") for part in trainers.split(",") if part.strip()]
    places = {name.strip(): place.strip() for name, _, place in pairs}
    for name in places:
        trainer_of(name)
    return places
