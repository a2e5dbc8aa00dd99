"""The public surface: it is what `__all__` says, it loads lazily, and each name is documented."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from torch import nn

import ygivenx as yx
from ygivenx.proof.evidence import Evidence


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


LAZY = {"nn": nn, "Probe": yx.Probe}  # imported for type checkers alone


def _classes(hint: Any) -> Iterator[Any]:
    if inspect.isclass(hint) and not get_args(hint):
        yield hint
    for inner in get_args(hint):
        yield from _classes(inner)


def _results(thing: Any) -> Iterator[Any]:
    """What a public function returns; what a class's fields, properties and methods are or return."""
    members = (
        [v for k, v in vars(thing).items() if not k.startswith("_")] if inspect.isclass(thing) else [thing]
    )
    for member in members:
        function = member.fget if isinstance(member, property) else member
        if inspect.isfunction(function):
            yield from _classes(get_type_hints(function, localns=LAZY).get("return"))
    if inspect.isclass(thing):
        for name, hint in get_type_hints(thing, localns=LAZY).items():
            yield from () if name.startswith("_") else _classes(hint)


@pytest.mark.parametrize("name", yx.__all__)
def test_what_is_returned_is_public(name):
    public = {id(getattr(yx, n)) for n in yx.__all__} | {id(Evidence)}  # of a Report: for its own page
    own = (c for c in _results(getattr(yx, name)) if c.__module__.startswith("ygivenx"))
    assert [c.__name__ for c in own if id(c) not in public] == []


def test_documents_use_public_names_alone():
    root = Path(__file__).parents[1]
    for path in (root / "README.md", *(root / "docs").glob("*.md")):
        code = re.findall(r"(?<!python -m )(?:from )?ygivenx\.([a-z_]+)", path.read_text())
        # Two modules of functions are public as modules.
        assert {c for c in code if c not in ("reference", "objectives", "json", "toml")} == set(), path.name


ROOT = Path(__file__).parents[1]
SCRIPTS = [
    p for folder in ("benchmarks", "examples", "scripts") for p in sorted((ROOT / folder).glob("*.py"))
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_a_script_imports_of_us_exists(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ygivenx":
            module = import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}"), alias.name
