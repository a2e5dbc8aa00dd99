"""The words of `docs/glossary.md`: what the project gave up doesn't come back, and one name means one type."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/ygivenx"

# Words that a reader has to translate. In texts some of them are plain English (`made of`), so there they may stand.
PRIVATE = r"\b(told|holes?|sheets?|doors?|company|shelf|shelves|studio)\b"
NOT_NOUNS = {"told", "said", "asked", "wanted", "made"}
NOT_FUNCTIONS = {
    "through",
    "once",
    "again",
    "apart",
    "same",
    "spent",
    "quietly",
    "dated",
    "beyond",
    "sweep",
}
A_SHELF_IS_FOR_SALE = "demo/task.py"


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def bound(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, name, whether it is a function) of all that a module names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name, True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id, False
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg, False
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr, False


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_speaks_plainly(path):
    text = path.read_text()
    words = [m for m in re.finditer(PRIVATE, text, re.I) if name_of(path) != A_SHELF_IS_FOR_SALE]
    assert [(text.count("\n", 0, m.start()) + 1, m.group()) for m in words] == []
    names = [(line, name.strip("_"), is_function) for line, name, is_function in bound(ast.parse(text))]
    assert [(line, name) for line, name, _ in names if name in NOT_NOUNS] == []
    assert [(line, name) for line, name, is_function in names if is_function and name in NOT_FUNCTIONS] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_document_speaks_plainly(path):
    text = path.read_text()
    assert [(text.count("\n", 0, m.start()) + 1, m.group()) for m in re.finditer(PRIVATE, text, re.I)] == []


def test_one_public_type_of_each_name():
    places = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name_of(path))
    several = {n: p for n, p in places.items() if len(p) > 1 and not n.startswith("_")}
    assert several == {}
