"""Pages of docs/reference that are made from definitions: `python scripts/reference.py` writes them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from ygivenx.commands.config import SECTIONS, default_text
from ygivenx.commands.migration import TOOLS
from ygivenx.commands.options import default_of, flags_of, meaning_of

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "Made by `python scripts/reference.py`; don't edit."


def train() -> str:
    """Every option of `ygx train` with its flag and its default."""
    lines = ["# Options of `ygx train`", "", NOTE, ""]
    for name, section in SECTIONS.items():
        lines += [f"## {name}", "", f"{section.__doc__}", "", "| flag | meaning | default |", "|---|---|---|"]
        hints = get_type_hints(section)
        for f in fields(section):
            default = default_of(f)
            shown = default_text(f) or ("" if default in (None, {}) else f"`{default}`")
            lines.append(f"| `{flags_of(f)[0]}` | {meaning_of(f, hints[f.name])} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def migration() -> str:
    """The options of other tools and ours."""
    lines = ["# Options of other tools", "", NOTE, ""]
    for tool, table in TOOLS.items():
        missing = sum(ours.startswith("?") for ours in table.values())
        lines += [f"## {tool}", "", f"{len(table)} of its most used options; {missing} are missing here.", ""]
        lines += ["| option | here |", "|---|---|"]
        lines += [f"| `{name}` | {_here(ours)} |" for name, ours in table.items()]
        lines.append("")
    return "\n".join(lines)


def _here(ours: str) -> str:
    if ours[0] in "-?":
        return f"{'refused' if ours[0] == '-' else 'missing'}: {ours[2:]}"
    key, _, how = ours.partition(" (")
    return ", ".join(f"`{k}`" for k in key.split(", ")) + (f" ({how}" if how else "")


PAGES = {"train.md": train, "migration.md": migration}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
