"""The table of `make mutate`: each guard's line stands once where the table says, and a test file of its is there."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from guards import GUARDS  # noqa: E402


@pytest.mark.parametrize("module", sorted({g.module for g in GUARDS}))
def test_each_guard_stands_once(module):
    text = (ROOT / "src/ygivenx" / module).read_text()
    assert {g.what: text.count(g.old) for g in GUARDS if g.module == module and text.count(g.old) != 1} == {}


def test_their_tests_are_there():
    files = {word for g in GUARDS for word in shlex.split(g.tests) if word.endswith(".py")}
    assert [f for f in files if not (ROOT / f).is_file()] == []
