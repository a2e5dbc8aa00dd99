"""The public surface: it is what `__all__` says, it loads lazily, and each name is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ygivenx as yx


def test_all_names_load_and_are_documented():
    for name in yx.__all__:
        assert getattr(yx, name).__doc__, name


def test_nothing_else_is_public():
    assert set(dir(yx)) == set(yx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scoring'"):
        yx.scoring  # noqa: B018


def test_import_is_free_of_torch():
    code = (
        "import sys, ygivenx.encoder.encode, ygivenx.forest, ygivenx.rows.data; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_functions_are_not_shadowed_by_modules():
    """`yx.loss` must stay the function, whatever has been imported."""
    for name in ("loss", "score", "ledger", "probe", "audit", "check", "pack", "load"):
        assert callable(getattr(yx, name))


def test_type_checkers_see_the_names_that_load():
    tree = ast.parse(Path(yx.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported.pop("reference") is None
    assert imported == yx._HOME
