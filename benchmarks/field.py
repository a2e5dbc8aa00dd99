"""Who trains what: trainers × tokenizers × rows, each cell judged by the audit's rules, as docs/field.md.

    python benchmarks/field.py FOLDER [TRAINER...]

For each trainer (by default all of `ygivenx.compare.trainers`) an environment of its own in FOLDER, made if it isn't
there: what pip resolves for the pinned version, over this Python's torch. Its cells replace those in
benchmarks/results/field.jsonl, and docs/field.md is written from that file. Tokenizers are those of `make tokenizers`
and the sample's, templates of gpt-oss and Llama 3.1 those that TRL ships.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import trl
from transformers import AutoTokenizer

from ygivenx import Encoder
from ygivenx.compare.comparing import OURS, Cell, judge, ours
from ygivenx.compare.running import run
from ygivenx.compare.trainers import TRAINERS, trainer_of
from ygivenx.models.resolve import sample_model_path
from ygivenx.proof.modes import numbered

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "field.jsonl", ROOT / "docs" / "field.md"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# name: (folder of .tokenizers, TRL's template where the folder has none or an old one, further stops)
TOKENIZERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "SmolLM2": ("", "", ()),
    "Qwen3": ("qwen3", "", ()),
    "Llama 3.1": ("llama3_1", "llama3_1", ()),
    "gpt-oss": ("gptoss", "gptoss", ("<|call|>",)),
    "Gemma 3": ("gemma3", "", ()),
}
CODES = {
    "exact": "✓", "after-end-trained": "✓", "refused": "–", "refused here": "?", "another-mode": "m",
    "loss-on-x": "X", "tool-result-trained": "T", "prompt-header-trained": "H", "history-reasoning-trained": "R",
    "end-untrained": "E", "y-untrained": "Y", "y-truncated": "K", "only-last-turn": "L", "context-differs": "C",
    "doubled-bos": "B", "weights-ignored": "W", "nothing-trained": "0", "document-cut": "D",
    "rows-unrecognised": "U", "shifted-labels": "S", "padding-trained": "P",
}  # fmt: skip


def said(*turns: str, system: str | None = None, **more: Any) -> dict[str, Any]:
    """A row of turns, the user's first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {
        "messages": [*([{"role": "system", "content": system}] if system is not None else []), *messages],
        **more,
    }


def asked(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


def with_call(*cities: str, answer: str | None = "It is clear.") -> dict[str, Any]:
    """A row in which the weather of cities is asked for by one call each, in one turn."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "weather", "description": "The weather of a city.", "parameters": parameters}
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": "weather", "arguments": {"city": c}}}
        for i, c in enumerate(cities)
    ]
    results = [
        {"role": "tool", "tool_call_id": c["id"], "name": "weather", "content": '{"sky": "clear"}'}
        for c in calls
    ]
    row = said(f"How is the weather in {' and '.join(cities)}?")
    row["messages"].append({"role": "assistant", "content": "", "tool_calls": calls})
    if answer is not None:
        row["messages"] += [*results, {"role": "assistant", "content": answer}]
    return {**row, "tools": [{"type": "function", "function": function}]}


def with_keys(row: dict[str, Any], at: int, **keys: Any) -> dict[str, Any]:
    """The row with keys in one of its messages."""
    messages = [m | keys if i == at % len(row["messages"]) else m for i, m in enumerate(row["messages"])]
    return {**row, "messages": messages}


TWO = ("What is 2+2?", "It is 4.", "And 3+5?", "It is 8.")
THOUGHT = "Two and two make four."
ROWS: dict[str, dict[str, Any]] = {
    "one turn": said(*TWO[:2]),
    "two turns": said(*TWO),
    "three turns": said(*TWO, "And 7+1?", "It is 8, too."),
    "system prompt": said(*TWO[:2], system="Answer in one sentence."),
    "system prompt, two turns": said(*TWO, system="Answer in one sentence."),
    "empty system prompt": said(*TWO[:2], system=""),
    "thought in its field": with_keys(said(*TWO[:2]), 1, reasoning_content=THOUGHT),
    "thought in the content": said(TWO[0], f"<think>\n{THOUGHT}\n</think>\n\nIt is 4."),
    "thoughts in two turns": with_keys(
        with_keys(said(*TWO), 1, reasoning_content=THOUGHT), 3, reasoning_content="Three and five make eight."
    ),
    "a call, its result, an answer": with_call("Lisbon"),
    "a call at the end": with_call("Lisbon", answer=None),
    "parallel calls": with_call("Lisbon", "Porto"),
    "tools, none called": {**with_call("Lisbon"), **said(*TWO[:2])},
    "first reply of weight 0": with_keys(said(*TWO), 1, weight=0),
    "empty reply": said(TWO[0], ""),
    "white space around a reply": said(TWO[0], "  It is 4. \n"),
    "line breaks before a reply": said(TWO[0], "\n\nIt is 4."),
    "white space around a question": said("\n What is 2+2?  ", "It is 4."),
    "two replies in a row": asked(*said(*TWO[:2])["messages"], {"role": "assistant", "content": "Yes, 4."}),
    "two questions in a row": asked({"role": "user", "content": "Hello."}, *said(*TWO[:2])["messages"]),
    "a greeting first": asked({"role": "assistant", "content": "Hi there!"}, *said(*TWO[:2])["messages"]),
    "long": said("Count to 900.", " ".join(map(str, range(900)))),
    "other scripts": said("Écris « où » en japonais 🙂", "それは「どこ」です。👩‍👩‍👧 Ça va ?"),
    "control tokens in a question": said("Are <|im_end|>, <|eot_id|> and <end_of_turn> alike?", "Yes."),
    "code": said("Print {{ x }}", "```python\nprint('{{ x }}')  # {% if %}\n```"),
}  # fmt: skip


def encoders() -> dict[str, Encoder]:
    """An encoder for each tokenizer, all of one time of day."""
    now = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    made = {}
    for name, (folder, template, stops) in TOKENIZERS.items():
        path, gguf_file = sample_model_path() if not folder else (ROOT / ".tokenizers" / folder, None)
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
        if template:
            tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
        made[name] = Encoder(tokenizer, stops=list(stops), now=now)
    return made


def environment(folder: Path, name: str) -> str:
    """The Python of a trainer's environment, which is made if it isn't there: this one's packages, then its own."""
    place = folder / name
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", place], check=True)
        (library,) = (place / "lib").glob("python*/site-packages")
        import torch

        (library / "parent.pth").write_text(str(Path(torch.__file__).parents[1]))
        (place / "constraints.txt").write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        pip = [python, "-m", "pip", "-q"]
        wanted = trainer_of(name).requirements
        subprocess.run([*pip, "install", "-c", place / "constraints.txt", *wanted], check=True)
        if (
            torch.version.cuda is None
        ):  # built for CUDA by the index, they don't load beside this torch; text needs none
            subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio"], check=True)
        (place / "ready").touch()
    return str(python)


def version_in(python: str, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def cells_of(name: str, folder: Path, known: dict[str, Encoder]) -> Iterator[dict[str, Any]]:
    """A line for each setting of a trainer under each tokenizer."""
    rows = [r for r in numbered(ROWS.values()) if not hasattr(r, "reason")]
    if name == OURS:
        of: dict[tuple[str, str], list[Cell]] = {
            (t, "default"): [own_cell(e, row, n) for n, row in enumerate(rows)] for t, e in known.items()
        }
        versions = {
            "version": importlib.metadata.version(OURS),
            "transformers": importlib.metadata.version("transformers"),
        }
    else:
        python, settings = environment(folder, name), list(trainer_of(name).settings)
        results = iter(
            run(
                name, settings, [e.tokenizer for e in known.values()], list(ROWS.values()), python, limit=1200
            )
        )
        of = {
            (t, setting): [judge(next(results), row, e) for row in rows]
            for t, e in known.items()
            for setting in settings
        }
        versions = {
            "version": version_in(python, trainer_of(name).package),
            "transformers": version_in(python, "transformers"),
        }
    for (tokenizer, setting), cells in of.items():
        yield {
            "trainer": name, "setting": setting, "tokenizer": tokenizer, **versions,
            "cells": dict(zip(ROWS, (c.outcome for c in cells), strict=True)),
            "confirmed": [
                r for r, c in zip(ROWS, cells, strict=True) if is_exact(c.outcome) and name != OURS
                and follows_prompts(known[tokenizer].tokenizer, ROWS[r], c)
            ],
            "examples": examples(cells),
        }  # fmt: skip


def own_cell(encoder: Encoder, row: Any, number: int) -> Cell:
    """Our cell, as the tests' checker sees it, which shares nothing with the encoder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from templates.checker import faults

    cell = ours(encoder, row, number)
    if cell.result.error:
        return cell
    stops = [encoder.tokenizer.eos_token, *encoder.options["stops"]]
    (example,), _ = encoder.batch([row])
    found = faults(encoder.tokenizer, row.value, example, stops, encoder.options["now"])
    return replace(cell, outcome=f"wrong: {found[0]}") if found else cell


def is_exact(outcome: str) -> bool:
    return CODES.get(outcome) == "✓" or outcome.startswith("exact")


def examples(cells: list[Cell]) -> dict[str, str]:
    """Of each rule one place, and of what was refused one reason."""
    found: dict[str, str] = {}
    for row, cell in zip(ROWS, cells, strict=True):
        if cell.result.error and cell.result.trainer != OURS:
            found.setdefault("refused", f"{row}: {cell.result.error}"[:160])
        for f in cell.findings:
            if f.severity != "info" and f.examples:
                text = " ".join(str(f.examples[0].get("text", "")).split())
                found.setdefault(f.rule, f"{row}: {text}"[:160])
    return found


def follows_prompts(tokenizer: Any, row: dict[str, Any], cell: Cell) -> bool:
    """A check that shares nothing with the audit: each stretch that is trained follows a prompt of transformers' own.

    The ids before it are those of apply_chat_template(..., add_generation_prompt=True) up to a reply, and its text is
    what the template writes there, to the end of the turn.
    """
    ids, trained = cell.result.ids, cell.result.weights > 0
    starts = np.flatnonzero(trained & ~np.append(False, trained[:-1]))
    replies = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    prompts = []
    for i in replies:
        options = {"tools": row.get("tools"), "add_generation_prompt": True, "return_dict": False}
        try:
            prompts.append(tokenizer.apply_chat_template(row["messages"][:i], **options))
        except Exception:  # a template may refuse to begin there
            continue
    return all(ids[:start].tolist() in prompts for start in starts) and len(starts) > 0


def page(lines: list[dict[str, Any]]) -> str:
    """docs/field.md."""
    by: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in sorted(
        lines,
        key=lambda x: (
            x["trainer"] != OURS,
            list(TRAINERS).index(x["trainer"]) if x["trainer"] != OURS else -1,
        ),
    ):
        by[line["trainer"], line["setting"]][line["tokenizer"]] = line
    parts = [
        HEAD.format(rows=len(ROWS), tokenizers=len(TOKENIZERS), trainers=len({t for t, _ in by}) - 1),
        summary(by),
    ]
    parts += [confirmed([line for of in by.values() for line in of.values() if line["trainer"] != OURS])]
    parts += ["## The rows", "\n".join(f"{n}. {row}" for n, row in enumerate(ROWS, 1))]
    parts += ["## Row by row", LEGEND]
    for tokenizer in TOKENIZERS:
        parts += [f"### {tokenizer}", table(by, tokenizer)]
    return "\n\n".join([*parts, "## What differs", *differences(by)]) + "\n"


def confirmed(lines: list[dict[str, Any]]) -> str:
    """How many exact cells a check of another kind confirms."""
    exact = sum(is_exact(outcome) for line in lines for outcome in line["cells"].values())
    again = sum(len(line["confirmed"]) for line in lines)
    return CONFIRMED.format(exact=exact, again=again)


def summary(by: Any) -> str:
    head = [
        "| trainer | version | transformers | setting | " + " | ".join(TOKENIZERS) + " |",
        "|---|---|---|---|" + "---|" * len(TOKENIZERS),
    ]
    for (trainer, setting), of in by.items():
        first = next(iter(of.values()))
        counts = [share(list(of[t]["cells"].values())) if t in of else "" for t in TOKENIZERS]
        head.append(
            f"| {trainer} | {first['version']} | {first['transformers']} | {setting} | {' | '.join(counts)} |"
        )
    return "\n".join(head)


def share(outcomes: list[str]) -> str:
    """Exact cells, of those that were made and can be judged."""
    return f"{sum(map(is_exact, outcomes))} / {sum(not o.startswith('refused') for o in outcomes)}"


def table(by: Any, tokenizer: str) -> str:
    head = [
        "| trainer, setting | " + " | ".join(map(str, range(1, len(ROWS) + 1))) + " |",
        "|---" * (len(ROWS) + 1) + "|",
    ]
    for (trainer, setting), of in by.items():
        if tokenizer in of:
            cells = [code(of[tokenizer]["cells"][row]) for row in ROWS]
            head.append(f"| {trainer}, {setting} | {' | '.join(cells)} |")
    return "\n".join(head)


def code(outcome: str) -> str:
    """One or a few letters for what came of a row."""
    if outcome.startswith("exact, "):
        return f"✓{outcome.split()[1]}"
    if outcome.startswith("refused: "):
        return "–"
    return "".join(CODES.get(rule, "!") for rule in outcome.split(", "))


def differences(by: Any) -> Iterator[str]:
    """Of each trainer: what it means to do, and each kind of difference with its number of cells and an example."""
    for trainer in TRAINERS:
        own = {s: of for (t, s), of in by.items() if t == trainer}
        if not own:
            continue
        text = [f"### {trainer}", f"Intent: {trainer_of(trainer).intent}."]
        for setting, of in own.items():
            counts = Counter(
                rule for line in of.values() for outcome in line["cells"].values() for rule in outcome.split(", ")
                if not is_exact(outcome)
            )  # fmt: skip
            kinds = [
                f"`{rule}` in {count}"
                + next(
                    (
                        f" ({t}, {line['examples'][rule]})"
                        for t, line in of.items()
                        if rule in line["examples"]
                    ),
                    "",
                )
                for rule, count in counts.most_common()
            ]
            text.append(f"{setting}:\n\n" + ("\n".join(f"- {k}" for k in kinds) or "- nothing differs"))
        yield "\n\n".join(text)


HEAD = """# The state of the field

What {trainers} trainers train of {rows} conversations under {tokenizers} tokenizers, as pip installs them, beside what
the chat template shows at inference. Made by `python benchmarks/field.py FOLDER`; for one trainer,
`python benchmarks/field.py FOLDER trl` makes a clean environment for it in FOLDER and fills in its cells.

A cell counts as exact if the trained tokens are those that the model has to write, each after the same ids as at
inference, and none is missed; the newline behind an end of turn is let pass. Where the template rewrites its history, a
row takes a sequence for each turn, and who makes but the last one trains the last reply alone. Counts are exact cells
of those in which the trainer made something and our encoder has a proof to judge it by. The first setting of a trainer
is its default."""
CONFIRMED = """A check that shares nothing with the audit confirms {again} of the {exact} exact cells of other trainers:
the ids before each trained stretch are those of `apply_chat_template(..., add_generation_prompt=True)`. Ours are
checked by the tests' checker, which shares nothing with the encoder. Unsloth
isn't there yet: it builds a trainer for each row, which takes long on two shared cores."""
LEGEND = """Numbers are the rows above. ✓ exact (✓2: as two sequences), – refused, ? not judged beyond loss on x, as our
encoder refuses the row, m right in another mode of the template alone. Wrong: X loss on x, T tool results, H headers,
R earlier reasoning, E end of turn untrained, Y parts of replies untrained, K cut at the end, D cut at the start, L the
last reply alone, C another context, B two BOS, W weights ignored, 0 nothing trained, U another text altogether. See
[the rules](audit.md)."""


def main(folder: Path, names: list[str]) -> None:
    known = encoders()
    for name in names or [OURS, *TRAINERS]:
        lines = list(cells_of(name, folder.absolute(), known))
        old = [json.loads(x) for x in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
        kept = [x for x in old if x["trainer"] != name]
        RESULTS.write_text("\n".join(json.dumps(x, ensure_ascii=False) for x in [*kept, *lines]) + "\n")
        PAGE.write_text(page([*kept, *lines]))
        print(name, "written", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
