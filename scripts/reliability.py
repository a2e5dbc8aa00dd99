"""docs/reliability.md from the outcomes of the attacks: run after `python -m attacks --write`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXT = """# Reliability

What was attacked, and what came of it. Each figure is an outcome of `attacks/` in `attacks/results/`; this page is
written by `scripts/reliability.py`. To run them: `python -m attacks [templates|resume|checkpoints] [--scale 0.1]`;
`make full` runs a part of each. [Security](security.md) says what is promised.

## Chat templates

{tried} hostile templates, each through the whole encoder in a process of its own. {bad} took more than 5 s of the
processor's time or 512 MB, or ended in an error that isn't ours; the longest took {longest_seconds} s, the largest
{most_megabytes} MB.

| outcome | templates |
|---|---|
{templates}

`accepted` and the reasons of the contract are of templates that are only odd. The templates of models are rendered in
the process of the encoder: only what may take any amount of time or memory is done in a
process with limits.

## Checkpoints

The disk fails at a call of a save (ENOSPC, EIO, half a file); bits of each file are flipped, files are cut, emptied,
deleted; the power fails at a call of a save, and what wasn't flushed is lost. A part of all calls was tried:
`{scale}`. Lost, silent, or in an error that isn't ours: {lost}.

| attack | outcomes |
|---|---|
{checkpoints}

## Resumed runs

Runs of {steps} steps (two micro-batches each) that were taken up after each step: weights and optimiser are the same
bits as in one run, but for {different}. The two ranks are those of `tests/test_ranks.py`.

| run | resumed |
|---|---|
{resumed}
"""


def result(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / f"attacks/results/{name}.json").read_text()))


def table(rows: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main() -> None:
    templates, checkpoints, resume = map(result, ("templates", "checkpoints", "resume"))
    outcomes = {
        k: ", ".join(f"{n} {word}" for word, n in v.items()) for k, v in checkpoints["outcomes"].items()
    }
    text = TEXT.format(
        tried=templates["tried"],
        bad=len(templates["bad"]) or "None",
        longest_seconds=templates["longest_seconds"],
        most_megabytes=templates["most_megabytes"],
        templates=table({f"`{k}`": v for k, v in templates["outcomes"].items()}),
        scale=f"--scale {checkpoints['scale']}",
        lost=len(checkpoints["bad"]) or "none",
        checkpoints=table(outcomes),
        steps=resume["steps"],
        different=len(resume["bad"]) or "none",
        resumed=table(resume["resumed"]),
    )
    (ROOT / "docs/reliability.md").write_text(text)


if __name__ == "__main__":
    main()
