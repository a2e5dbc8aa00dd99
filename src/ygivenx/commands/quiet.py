"""Other libraries say nothing between our lines, unless it is a warning or the user asks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..models.resolve import silenced


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """No advice, no progress bars and no deprecations of other libraries, unless `verbose`."""
    if verbose:
        yield
        return
    with silenced(), warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield
