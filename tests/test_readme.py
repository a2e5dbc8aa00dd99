"""The README is run: its Python blocks in one namespace, and the names of its commands against `ygx`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ygivenx.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.full
@pytest.mark.model
def test_the_python_blocks_run(smol, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 4
    assert len(blocks[0].strip().splitlines()) <= 5
    assert "assert" in blocks[0]
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_every_command_that_it_names_exists():
    named = set(re.findall(r"^ygx +(\w+)", README, re.M))
    assert named >= {"show", "train", "generate", "score", "audit", "probe"}
    for command in named:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
