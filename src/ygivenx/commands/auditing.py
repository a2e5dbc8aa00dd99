"""`ygx audit`: rows, a prepared set, or a prepared set against the rows that it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..proof.auditing import Report, audit, audit_prepared
from ..proof.limits import read_limits
from ..proof.prepared import Prepared
from .config import EncoderSection, LimitedRowOptions, ModelOptions
from .inputs import open_encoder, open_rows, say

if TYPE_CHECKING:
    from collections.abc import Mapping


def audited(
    data: str | None, labels: str | None, source: ModelOptions, rows: LimitedRowOptions, section: EncoderSection,
    suppress: Mapping[str, str],
) -> Report:  # fmt: skip
    """The report of what was given; raises ConfigError where nothing was.

    --split and --limit are of the rows; without rows, of the prepared set.
    """
    if data is None and labels is None:
        raise ConfigError("nothing to audit", fix="give rows, --labels PREPARED, or both")
    # One pair of options for two sources: what is read as rows has them first.
    of_labels = rows if data is None else LimitedRowOptions()
    prepared = None if labels is None else Prepared(labels, of_labels.split, of_labels.limit)
    reader = None if data is None else open_rows(data, rows)
    if reader is not None:
        say(f"format: {reader.format}")
    if prepared is not None:
        say(
            f"prepared: {prepared.ids_column} with {', '.join(prepared.columns) or 'no labels: all is trained'}"
        )
    encoder = open_encoder(source, section)
    limits = read_limits(str(source.path), source.gguf_file)
    if prepared is None:
        return audit(rows=list(reader or ()), encoder=encoder, model=limits, suppress=suppress)
    return audit_prepared(prepared, reader, encoder, limits=limits, suppress=suppress)
