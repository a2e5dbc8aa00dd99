"""The documentation is run: each page's code in order, in a folder of its own; and its lists are complete.

In a page, a block of Python is run in the page's namespace; one with `title="name"` is written as that file; each line
of a `bash` block is a command that must succeed (or end with `exit=N`). `console` blocks need what a test doesn't have:
another program, a hub, GPUs. Their commands and options must exist all the same.
"""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from ygivenx.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([DOCS / "index.md", DOCS / "idea.md", *(DOCS / "how-to").glob("*.md")])
# Models of the hub whose tokenizers `make tokenizers` fetches.
FETCHED = {"Qwen/Qwen3-0.6B": ROOT / ".tokenizers/qwen3"}
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    language: str
    title: str | None
    exit: int
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    for language, options, text in BLOCK.findall(page.read_text()):
        title = re.search(r'title="([^"]+)"', options)
        code = re.search(r"exit=(\d)", options)
        found.append(Block(language, title and title[1], int(code[1]) if code else 0, text))
    return found


def run(command: str, exit_code: int) -> None:
    program, *arguments = shlex.split(command)
    assert program == "ygx", command
    for i, argument in enumerate(arguments):
        if argument in FETCHED:
            if not FETCHED[argument].is_dir():
                pytest.skip("not fetched: make tokenizers")
            arguments[i] = str(FETCHED[argument])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == exit_code, f"{command}\n{result.output}\n{result.exception!r}"


@pytest.mark.full
@pytest.mark.model
@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_a_page_runs(page, smol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), namespace)
        elif block.language == "bash":
            for line in block.text.strip().splitlines():
                run(line, block.exit)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `ygx` command in the documentation and the README."""
    found = []
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for block in blocks(page):
            if block.language in ("bash", "console", ""):
                lines = [line.split(" #")[0] for line in block.text.splitlines()]
                found += [(page.name, shlex.split(line)) for line in lines if line.startswith("ygx ")]
    return found


def test_every_command_and_option_exists():
    known = get_command(app).commands
    assert len(commands()) > 20
    for page, (_, name, *words) in commands():
        assert name in known, (page, name)
        options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)}
        ours = itertools.takewhile(lambda word: not word.endswith(".py"), words)  # the rest is the script's
        for word in ours:
            assert not re.match(r"--?[a-z]", word) or word.partition("=")[0] in options, (page, name, word)


def test_every_reason_is_explained_and_no_other():
    source = "\n".join(p.read_text() for p in (ROOT / "src/ygivenx").rglob("*.py"))
    given = set(re.findall(r'reason="(\w+)"', source))
    tables = "\n".join(
        line.split("|")[1]
        for line in (DOCS / "reference/errors.md").read_text().splitlines()
        if line[:3] == "| `"
    )
    explained = set(re.findall(r"`(\w+)`", tables))
    assert given - explained == set()
    assert {reason for reason in explained - given if f'"{reason}"' not in source} == set()


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    site = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS))
        assert name in site or name.startswith("museum/"), name
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert link.startswith(("http", "mailto")) or (page.parent / link).exists(), (name, link)


def test_the_reference_of_commands_is_the_commands():
    made = CliRunner().invoke(_documenter(), ["ygivenx.cli", "utils", "docs", "--name", "ygx"])
    assert made.exit_code == 0
    # `make docs` writes it.
    assert (DOCS / "reference/cli.md").read_text() == made.output.rstrip() + "\n"


def _documenter():
    from typer.cli import app as typer_app

    return typer_app
