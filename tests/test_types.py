"""What a type checker sees: each public name has a real type, and the README's code type-checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from mypy import api

import ygivenx as yx
from ygivenx.choices import Severity
from ygivenx.report.page import SEVERITIES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> str:
    """mypy's report on a file that reveals every public name, and on the README's Python blocks."""
    folder = tmp_path_factory.mktemp("types")
    public, readme = folder / "public.py", folder / "readme.py"
    public.write_text("import ygivenx as yx\n" + "".join(f"reveal_type(yx.{n})\n" for n in yx.__all__))
    readme.write_text("\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)))
    config = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"))
    report, errors, _ = api.run([*config, str(public), str(readme)])
    assert not errors
    return report


def test_no_public_name_is_any(checked):
    revealed = re.findall(r'public\.py:(\d+): note: Revealed type is "(.*)"', checked)
    assert len(revealed) == len(yx.__all__)
    assert [yx.__all__[int(line) - 2] for line, kind in revealed if kind == "Any"] == []


def test_the_readme_type_checks(checked):
    assert [line for line in checked.splitlines() if "readme.py" in line and "error:" in line] == []


def test_choices_name_what_there_is():
    assert get_args(Severity) == SEVERITIES
