"""docs/architecture.md names every module of the package, and no other; functions stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/ygivenx"
PAGE = (ROOT / "docs/architecture.md").read_text()
# A row of the table: the folder, and what stands in it. A name that ends in `/` is a folder inside.
ROWS = dict(re.findall(r"^\| (?:`(\w+)/`|beside them) \| (.*) \|$", PAGE, re.M))
# Modules of a folder that say nothing a reader looks for: the package's own file, and the entry of `python -m`.
PLUMBING = {"__init__", "__main__"}


def modules(folder: str) -> set[str]:
    place = SOURCE / folder
    files = {p.stem for p in place.glob("*.py")} - PLUMBING
    return files | {f"{p.parent.name}/" for p in place.glob("*/*.py") if folder}


def test_the_folders_are_those_of_the_package():
    assert {name for name in ROWS if name} == {p.parent.name for p in SOURCE.glob("*/__init__.py")}


@pytest.mark.parametrize("folder", ROWS)
def test_a_folder_has_the_modules_that_are_named(folder):
    named = re.findall(r"`([a-z_]+/?)`", re.sub(r"`(ygx \w+|yx\.\w+)`", "", ROWS[folder]))
    assert sorted(named) == sorted(modules(folder)), "correct docs/architecture.md"


def test_functions_are_small():
    """Lines of all functions, docstrings included: half of them at most 8, nine in ten 25, and none over 60."""
    trees = [ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    sizes = [n.end_lineno - n.lineno + 1 for tree in trees for n in ast.walk(tree) if isinstance(n, kinds)]
    assert (np.quantile(sizes, (0.5, 0.9, 1)) <= (8, 25, 60)).all()
