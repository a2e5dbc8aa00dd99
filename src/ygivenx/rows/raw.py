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


Source = Callable[[], Iterator[RawRow | None]]
