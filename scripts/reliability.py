"""docs/reliability.md from the outcomes of the attacks: run after `python -m attacks --write`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXT = """# Reliability

What was attacked, and what came of it. Each figure is an outcome of `attacks/` in `attacks/results/`; this page is
written by `scripts/reliability.py`. To run them: `python -m attacks [NAME] [--scale 0.1]`; `make full` runs a part of
each. [Security](security.md) says what is promised.
"""
TEMPLATES = """## Chat templates

{tried} hostile templates, each through the whole encoder in a process of its own. More than 5 s of the processor's time
or 512 MB, or an error that isn't ours: {wrong}. The longest took {longest_seconds} s, the largest {most_megabytes} MB.

| outcome | templates |
|---|---|
{outcomes}

`accepted` and the reasons of the contract are of templates that are only odd. The templates of models are rendered in
the process of the encoder: only what may take any amount of time or memory is done in a process with limits.
"""
CHECKPOINTS = """## Checkpoints

A call of the file system goes wrong while a run saves (`attacks/faults.c`): the disk is full (ENOSPC) or fails (EIO), a
write ends halfway, the process is killed there, or the power fails there and what wasn't flushed is lost, in a second
way renames too. Then the run is taken up, and has to end in the same bits. Damage: bits of each file are flipped, one
at a time; files are cut, emptied, filled with zeros, deleted. {share}Lost, silent, or another error: {wrong}.

| attack | outcomes |
|---|---|
{outcomes}
"""
FILES = """## Files of commands

The same faults while `ygx score` and `ygx encode` write, and while encoded rows are kept for the next run; then the
command is run again as it was. {share}Lost, doubled, half a file under its name, or an error that isn't ours: {wrong}.

| what writes | outcomes |
|---|---|
{outcomes}
"""
RESUME = """## Resumed runs

Runs of {steps} steps of two micro-batches, with dropout, that were taken up after each step and went on for one, and
some to the end: weights, optimiser, schedule and random generators have to be the same bits as in one run. Other bits:
{wrong}.

| run | resumed |
|---|---|
{outcomes}
"""
FORGED = """## Forged control tokens

Control tokens of real tokenizers, and texts that look like turns, in every field of a row, refused or encoded as text.
All ids are compared with those of a tokenizer without control tokens. {share}Other ids: {wrong}.

| tokenizer, control | outcomes |
|---|---|
{outcomes}
"""
FUZZ = """## Random inputs

hypothesis's: bytes of files of rows, values of rows, configs, command lines, and files of checkpoints that were sealed
after they were changed. {share}Errors that aren't ours, or rows that don't add up: {wrong}.

| input | outcomes |
|---|---|
{outcomes}
"""
SECTIONS = {
    "templates": TEMPLATES, "checkpoints": CHECKPOINTS, "files": FILES, "resume": RESUME, "forged": FORGED,
    "fuzz": FUZZ,
}  # fmt: skip


def counted(value: Any) -> str:
    """Counts by word in one cell."""
    return (
        ", ".join(f"{n:,} {word}" for word, n in value.items()) if isinstance(value, Mapping) else str(value)
    )


def section(name: str, text: str) -> str:
    """A section with its outcomes, where there are any."""
    path = ROOT / "attacks" / "results" / f"{name}.json"
    if not path.exists():
        return ""
    found: dict[str, Any] = json.loads(path.read_text())
    rows = found.get("outcomes", found.get("resumed", {}))
    whole = found["scale"] == 1
    given = {
        "outcomes": "\n".join(f"| {name} | {counted(value)} |" for name, value in rows.items()),
        "wrong": len(found["bad"]) or "none",
        "share": "" if whole else f"A part was tried: `--scale {found['scale']}`. ",
    }
    return "\n" + text.format(**found | given)


if __name__ == "__main__":
    (ROOT / "docs/reliability.md").write_text(TEXT + "".join(section(*item) for item in SECTIONS.items()))
