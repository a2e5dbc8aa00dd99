"""Packages of a release that ygivenx was never run with, or that is known to compute something else, are refused."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from .errors import ConfigError


@cache
def refuse_unsupported() -> None:
    """Raise ConfigError for an installed package outside the range that ygivenx declares, extras included.

    transformers 5.1, as an example, divides a gradient once more than its Trainer should; nothing would say so.
    """
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in requires("ygivenx") or ()]
    except PackageNotFoundError:  # run from a checkout
        return
    for needed in declared:
        if needed.marker is not None and not {"dev", "docs"}.isdisjoint(str(needed.marker).split('"')):
            continue
        try:
            there = version(needed.name)
        except PackageNotFoundError:
            continue  # an extra, or whoever imports it says so
        if not needed.specifier.contains(there, prereleases=True):
            raise ConfigError(
                f"{needed.name} {there} is installed",
                why=f"ygivenx was tested with {needed.name} {needed.specifier} alone; others are known to fail, or to "
                "compute something else without a word",
                fix=f"pip install '{needed.name}{needed.specifier}'",
            )
