"""What the package declares: extras that messages and docs name exist, and CI tests both ends of every range."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEXTS = [
    ROOT / "README.md",
    ROOT / "Makefile",
    ROOT / "noxfile.py",
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / ".github").rglob("*.yml"),
]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_the_extras():
    assert EXTRAS.keys() == {"train", "lora", "quant", "eval", "ray", "docs", "dev"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_extras_that_are_named_exist(path):
    named = re.findall(r"(?:ygivenx|\.)\[([a-z,-]+)\]", path.read_text())
    assert {extra for names in named for extra in names.split(",")} <= EXTRAS.keys()


def test_what_is_missing_is_in_the_extra_that_messages_name():
    asked = re.findall(r'MissingExtra\("([\w-]+)", "([\w-]+)"', "".join(p.read_text() for p in SOURCES))
    assert len(asked) >= 6
    for package, extra in asked:
        assert package in " ".join(EXTRAS[extra]), f"{package} isn't in the extra {extra}"


def test_every_python_that_is_declared_is_tested():
    pythons = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    workflow, sessions = ((ROOT / name).read_text() for name in (".github/workflows/ci.yml", "noxfile.py"))
    assert min(pythons, key=lambda v: int(v[2:])) == PROJECT["requires-python"].removeprefix(">=")
    assert {p for p in pythons if f'"{p}"' not in workflow or f'"{p}"' not in sessions} == set()


@pytest.mark.parametrize(
    "command", [["-c", "import ygivenx"], ["-m", "ygivenx", "--help"]], ids=["import", "help"]
)
def test_neither_the_import_nor_help_loads_torch(command):
    """Torch and transformers take seconds. docs/performance.md has the times."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True
    )
    loaded = set(re.findall(r"\| +(\w+)$", done.stderr, re.M))
    assert "ygivenx" in loaded
    assert loaded & {"torch", "transformers", "pyarrow", "datasets", "peft", "pandas"} == set()
