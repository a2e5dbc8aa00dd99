"""What files hold before its meaning is known.

A source is a function without arguments that starts a fresh iteration; None in a row's stead is a blank line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import RowError


class RawRow(NamedTuple):
    """A row's place in its file, its value, and what is wrong with it, if anything.

    Lines count from 1, as editors have them; rows from 0, as `--row` has them.
    """

    place: str
    value: Any
    fault: RowError | None = None


# A row in its file, and what is decoded of a file at a time: one long row, or several.
MAX_ROW_BYTES = 64 << 20
MAX_BATCH_BYTES = 4 * MAX_ROW_BYTES


def too_long(limit: int) -> RowError:
    """A row of more than `limit` bytes."""
    fix = f"mend the row, or allow more, as in max_row_bytes={2 * limit}"
    return RowError(f"longer than {limit:,} bytes", reason="too_long", fix=fix)


Source = Callable[[], Iterator[RawRow | None]]
