"""docs/reliability.md from the outcomes of the attacks: run after `python -m attacks --write`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from attacks.checkpoints import CASES as CHECKPOINTS  # noqa: E402
from attacks.forged import FIELDS  # noqa: E402

TEXT = """# Reliability

What was attacked, and what came of it. Each figure is an outcome of `attacks/` in `attacks/results/`; this page is
written by `scripts/reliability.py`. To run them: `python -m attacks [NAME] [--scale 0.1]`; `make full`
runs a part of each. [Security](security.md) says what is promised.

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

## Faults of the disk

{faults_calls} times a call of the file system went wrong (`attacks/faults.c`), while a run saves a checkpoint, while
`ygx score` and `ygx encode` write, and while encoded rows are kept: the disk is full (ENOSPC) or fails (EIO), a write
ends halfway, the process is killed there, or the power fails there and what wasn't flushed is lost, in a second way
renames too. Then the same is run again. {faults_bad} of them lost something, was silent, or ended in an error that
isn't ours.
{faults_scale}

| what writes | faults |
|---|---|
{faults}

## Damaged checkpoints

Bits of each file are flipped, one at a time; files are cut, emptied, filled with zeros, deleted. Not seen, or not
passed over for the older one: {damage_bad}.

| checkpoint | damaged files |
|---|---|
{damage}

## Resumed runs

Runs of {steps} steps of two micro-batches, with dropout, that were taken up after each step and went on for one, and
some to the end: weights, optimiser, schedule and random generators are the same bits as in one run, but for
{different}.

| run | resumed |
|---|---|
{resumed}

## Forged control tokens

Each control token of a tokenizer (the first 40), and texts that look like turns, in {fields} fields of a row, refused
or encoded as text. All ids are compared with those of a tokenizer without control tokens: {forged_bad} differ.

| tokenizer, control | outcomes |
|---|---|
{forged}

## Random inputs

hypothesis's: bytes of files of rows, values of rows, configs, command lines, and files of checkpoints that were sealed
after they were changed. Errors that aren't ours, or rows that don't add up: {fuzz_bad}.

| input | outcomes |
|---|---|
{fuzz}
"""


def result(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / f"attacks/results/{name}.json").read_text()))


def table(rows: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def outcomes(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {word}" for word, n in counts.items())


def main() -> None:
    templates, checkpoints, resume, files, forged, fuzz = map(
        result, ("templates", "checkpoints", "resume", "files", "forged", "fuzz")
    )
    saves = checkpoints["outcomes"] | {f"faults, {k}": v for k, v in files["outcomes"].items()}
    faults = {k.removeprefix("faults, "): v for k, v in saves.items() if k.startswith("faults")}
    scales = {checkpoints["scale"], files["scale"]}
    bad = [b for b in checkpoints["bad"] if "at call" not in b]
    text = TEXT.format(
        tried=templates["tried"],
        bad=len(templates["bad"]) or "None",
        longest_seconds=templates["longest_seconds"],
        most_megabytes=templates["most_megabytes"],
        templates=table({f"`{k}`": v for k, v in templates["outcomes"].items()}),
        faults_calls=f"{sum(sum(v.values()) for v in faults.values()):,}",
        faults_bad=len(checkpoints["bad"]) - len(bad) + len(files["bad"]) or "None",
        faults_scale="" if scales == {1.0} else f"A part of all calls was tried: `--scale {min(scales)}`.",
        faults=table({f"a save: {k}" if k in CHECKPOINTS else k: outcomes(v) for k, v in faults.items()}),
        damage=table(
            {k[8:]: outcomes(v) for k, v in checkpoints["outcomes"].items() if k.startswith("damage")}
        ),
        damage_bad=len(bad) or "none",
        steps=resume["steps"],
        different=len(resume["bad"]) or "none",
        resumed=table(resume["resumed"]),
        fields=len(FIELDS),
        forged=table({k: outcomes(v) for k, v in forged["outcomes"].items()}),
        forged_bad=len(forged["bad"]) or "none",
        fuzz=table({k: outcomes(v) for k, v in fuzz["outcomes"].items()}),
        fuzz_bad=len(fuzz["bad"]) or "none",
    )
    (ROOT / "docs/reliability.md").write_text(text)


if __name__ == "__main__":
    main()
