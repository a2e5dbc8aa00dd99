"""Write docs/museum from the exhibits: `python -m tests.museum.pages DATA [NAME ...]` runs them (or those named).

Every sentence but the descriptions comes from the report of a run, so the pages can't say what isn't so.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from ygivenx.proof.auditing import Report
from ygivenx.proof.rules import RULES

from .exhibits import EXHIBITS, Exhibit, run
from .harness import Setup, quiet

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "museum"
RESULTS = ROOT / "benchmarks" / "results" / "museum.json"
COMMAND = "python -m tests.museum.pages ../shared/data"


GUIDE = """# The audit

```python
import ygivenx as yx

report = yx.audit(rows, encoder)                    # the data, as the contract reads it
report = yx.audit(rows, encoder, batch=batch)       # what its labels train
report = yx.audit(trainer=trainer)                  # what one step of it trains, by the gradient
with yx.probe(model) as step: ...                   # any loop of your own:
report = yx.audit(rows, encoder, probe=step, batch=batch, model=model)  # the batch and the model: for leaks

print(report)
report.to_html("audit.html"); report.to_json(); report.to_sarif()
sys.exit(report.exit_code("warning"))               # 1 if a finding is that severe
yx.audit(trainer=trainer, suppress={"loss-on-x": "continued pre-training on purpose"})
```

`trainer` may be any transformers trainer, TRL's included. One optimiser step of it is rehearsed through its own data
loader, collator and `training_step`, with checkpointing, autocast and gradient scaling as train() sets them; there is
no update, and the model, gradients, random states, accelerator and the trainer's attributes are afterwards what they
were. What is not rehearsed (NEFTune's noise, Liger's kernels, the new model that `model_init` makes) is named in the
summary. What is trained is read from the gradient at the output head, so a mask that a loss ignores can't hide; a term
beside the cross-entropy (z-loss, distillation) is named and counts as no target. The [museum](museum/README.md) shows
each rule at work. Tests hold 62 broken set-ups, each named by its rule, and 37 sound ones of which nothing above info
is said (`tests/museum`, `tests/test_prepared.py`).

A rule that lacks what it needs says nothing. Without `rows` (or a dataset that still has its messages) replies are
found by the headers that the chat template writes, as in prepared sets below; `ygx probe --data rows.jsonl train.py`
hands the rows over. The report says how many rows of the batch it recognised among those given, and warns where it
recognised none. A row of the batch is one of them if the two agree in at least half of the tokens that aren't common to
many rows.

The fix of a finding names the setting of the trainer that was seen, where it has one, and how to hand it rows of ours.

## Prepared sets

```
ygx audit rows.jsonl --labels last_run_prepared/1a2b3c --model model/
ygx audit --labels prepared.parquet --model model/
```

reads what a trainer has written before a run: a directory that `datasets` saved, Parquet, Arrow or JSON Lines with
`input_ids` and `labels`, `loss_mask`, `completion_mask`, `assistant_masks` or weights, padded or packed. It finds the
rows again in it, cut and packed ones too, and says what differs from what inference shows. A row that is right in
another mode of the template (thinking switched off, say) is named so; a row that the encoder refuses is audited for
loss on x alone. Without rows, replies are found by the headers that the chat template writes, and the audit says what
ids alone can tell: loss on x, headers and padding that are trained, ends that aren't, two BOS. Rows that repeat
another one or answer its prompt otherwise are named either way. A reply of which
nothing is trained may be meant so, and a prompt that inference shows otherwise can't be known. Memory holds a part of
the set at a time. In Python: `yx.audit(rows, encoder, labels="last_run_prepared/1a2b3c")`.

`--junit` and `--sarif` write what CI services read. `examples/audit.yml` is a GitHub action that fails a pull request
whose data trains x.

## Ranks

In a process group `audit(trainer=...)` gathers from all ranks, so all of them have to call it; rows, a batch or a
probe may be audited on one rank alone. A head that FSDP, ZeRO-3 or tensor parallelism has sharded is refused: audit
the same set-up in one process.
"""


def title(exhibit: Exhibit) -> str:
    return inspect.getdoc(exhibit.build).split("\n")[0].rstrip(".")


def page(exhibit: Exhibit, report: Report, versions: str) -> str:
    """One exhibit in Markdown."""
    source = inspect.getsource(exhibit.build)
    source = source[source.index("def ") :]
    body = [f"# {title(exhibit)}", ""]
    if exhibit.rule is None:
        body += ["A sound set-up: nothing above `info` is found.", ""]
    else:
        body += [
            f"Found by the rule `{exhibit.rule}`"
            + (", on defaults as they ship." if exhibit.default else "."),
            "",
        ]
        body += ["**What it does to a run.** " + exhibit.effect, ""]
    body += ["**The set-up**", "", "```python", source.rstrip(), "```", "", "**What the audit says**", ""]
    body += ["```text", str(report), "```", "", f"*{versions}; written by `{COMMAND}`.*", ""]
    return "\n".join(body)


def index(rows: list[dict[str, Any]]) -> str:
    """The table of all exhibits."""
    lines = ["# The museum of faults", ""]
    lines += ["Set-ups broken on purpose, each found by a rule, and sound ones with nothing to find. ★: defaults "
              "as they ship.", "", "| exhibit | found by | everything found |", "|---|---|---|"]  # fmt: skip
    for row in rows:
        star = " ★" if row["default"] else ""
        found = ", ".join(f"{f['rule']} ({f['severity']})" for f in row["findings"]) or "nothing"
        lines.append(f"| [{_cell(row['title'])}]({row['name']}.md){star} | {row['rule'] or '—'} | {found} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def guide() -> str:
    """docs/audit.md: how to ask, and the table of rules."""
    lines = [GUIDE, "| rule | severity | why | what to do |", "|---|---|---|---|"]
    lines += [f"| `{r.id}` | {r.severity} | {_cell(r.why)} | {_cell(r.fix)} |" for r in RULES.values()]
    return "\n".join([*lines, ""])


def record(exhibit: Exhibit, report: Report) -> dict[str, Any]:
    findings = [
        {"rule": f.rule, "severity": f.severity, "count": f.count, "share": f.share} for f in report.findings
    ]
    return {
        "name": exhibit.name,
        "title": title(exhibit),
        "rule": exhibit.rule,
        "default": exhibit.default,
        "summary": report.summary,
        "findings": findings,
    }


def main(data: str, *names: str) -> None:
    import datasets
    import torch
    import transformers
    import trl
    from transformers import AutoTokenizer

    from ygivenx.models.resolve import sample_model_path

    datasets.disable_progress_bars()
    versions = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    path, gguf_file = sample_model_path()
    setup = Setup(AutoTokenizer.from_pretrained(path, gguf_file=gguf_file), Path(data))
    DOCS.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text())["exhibits"] if names else []
    by_name = {row["name"]: row for row in known}
    for exhibit in EXHIBITS:
        if names and exhibit.name not in names:
            continue
        report = run(exhibit, setup)
        by_name[exhibit.name] = record(exhibit, report)
        (DOCS / f"{exhibit.name}.md").write_text(page(exhibit, report, versions))
        print(exhibit.name, [f.rule for f in report.findings], flush=True)
    rows = [by_name[e.name] for e in EXHIBITS]
    (DOCS / "README.md").write_text(index(rows))
    (ROOT / "docs" / "audit.md").write_text(guide())
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    told = {"command": COMMAND, "versions": versions, "exhibits": rows}
    RESULTS.write_text(json.dumps(told, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    with quiet():
        main(*sys.argv[1:])
