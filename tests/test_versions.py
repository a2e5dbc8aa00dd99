"""Releases that ygivenx wasn't tested with are refused at the start, by name and with what to install."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ygivenx as yx
from ygivenx import versions

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
PROJECT = tomllib.loads(PYPROJECT.read_text())["project"]


@pytest.fixture
def installed(monkeypatch):
    """Packages that are there in a release of our choice; what is declared is pyproject.toml's."""
    there = {}
    extras = [f'{r}; extra == "{n}"' for n, group in PROJECT["optional-dependencies"].items() for r in group]
    monkeypatch.setattr(versions, "requires", lambda name: [*PROJECT["dependencies"], *extras])
    original = versions.version
    monkeypatch.setattr(versions, "version", lambda name: there.get(name) or original(name))
    versions.refuse_unsupported.cache_clear()
    yield there
    versions.refuse_unsupported.cache_clear()


def test_what_is_installed_here_is_supported(installed):
    versions.refuse_unsupported()


@pytest.mark.parametrize(
    ("name", "release"),
    [("transformers", "5.1.0"), ("transformers", "4.57.6"), ("accelerate", "1.2.1"), ("gguf", "0.10.0")],
)
def test_releases_that_are_known_to_be_wrong(installed, name, release):
    installed[name] = release
    with pytest.raises(yx.ConfigError, match=f"{name} {re.escape(release)} is installed") as e:
        versions.refuse_unsupported()
    assert f"pip install '{name}>=" in str(e.value)
    with pytest.raises(yx.ConfigError):
        yx.Trainer  # noqa: B018 (asking for it is what fails)


def test_a_development_version_is_in_the_range(installed):
    installed["transformers"] = "5.25.0.dev0"
    versions.refuse_unsupported()


def test_the_command_refuses_them_too(tmp_path):
    code = (
        "import sys, ygivenx.versions as v; real = v.version; "
        "v.requires = lambda n: ['transformers>=5.2']; "
        "v.version = lambda n: '5.0.0' if n == 'transformers' else real(n); "
        "import ygivenx.cli as c; sys.argv = ['ygx', '--version']; c.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "transformers 5.0.0 is installed" in done.stderr
    assert "Traceback" not in done.stderr
