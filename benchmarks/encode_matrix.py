"""What becomes of each conversation of the test matrix under each template, with real vocabularies, and why.

make tokenizers
python benchmarks/encode_matrix.py > FILE
python benchmarks/encode_matrix.py --templates FOLDER --current --details FILE
python benchmarks/encode_matrix.py --of FILE --write docs/encoding.md > benchmarks/results/encode-matrix.json

By default the templates are those that TRL ships; `--templates` takes a folder of others, named SOURCE--NAME.jinja
(scripts/fetch_templates.py makes one), with `--current` those of today's models alone. They aren't ours to ship: the
report has their names, counts and outcomes. `--details` adds each outcome to a file, so that parts of the matrix may be
run apart; `--of` reports on such a file, and `--write` puts the table between its marks in a document.

Every mask that is given is checked by tests/templates/checker.py, which shares nothing with the encoder. A refusal is
the contract's if the template can render all that the replies say. Each refusal is tried with the options that its
message names, and, where none works, with every other: a message that names none though one works is unhelpful.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from templates.checker import NOW, faults, provable, rendered_in_full, switches_of
from templates.conversations import MATRIX
from templates.real import Family, family_of, is_there, real_tokenizer
from templates.stock import stock_templates

from ygivenx import Encoder, RowError
from ygivenx.errors import ConfigError

CURRENT = frozenset((Path(__file__).parents[1] / "tests/templates/current.txt").read_text().split())
# One conversation for each column of the table of models.
KINDS = {
    "plain": "one turn",
    "multi-turn": "two turns",
    "system": "with a system prompt",
    "tools": "parallel calls",
    "reasoning": "reasoning",
    "tools + reasoning": "reasoning before a call",
}
# Refusals that say something of the row, whatever the template: not the contract's.
OF_ROWS = {"control_text", "unknown_part"}
GIVEN = ("trained", "repaired")


@dataclass
class Outcome:
    """What became of one row: `trained` as the template writes it, `repaired`, `refused` or `unrendered`."""

    template: str
    title: str
    result: str
    sequences: int = 0
    reason: str = ""
    message: str = ""
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    in_full: bool | None = None  # refused: whether the template can write all that the replies say
    provable: str | None = None  # refused: a spelling by which an exact mask exists
    helped_by: str | None = None  # refused: an option that the message names and that works
    unnamed: str | None = None  # refused: one that works and isn't named


class Bench:
    """One template: its tokenizer, its family's stops, and an encoder for each choice of options."""

    def __init__(self, name: str, template: str, family: Family) -> None:
        self.name, self.family = name, family
        self.tokenizer = real_tokenizer(name, template, family)
        self._encoders: dict[str, Encoder] = {}

    def encoder(self, **options: Any) -> Encoder:
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in self._encoders:
            stops = [*self.family.stops, *options.pop("stops", [])]
            self._encoders[key] = Encoder(self.tokenizer, stops=stops, now=NOW, **options)
        return self._encoders[key]

    def outcome(self, title: str, row: dict[str, Any], *, tries: bool) -> Outcome:
        try:
            example = self.encoder()(row)
        except RowError as e:
            return self._refused(title, row, e, tries)
        notes = [n for s in example.sequences for n in s.notes]
        result = "repaired" if notes else "trained"
        found = faults(self.tokenizer, row, example, self.family.stops)
        return Outcome(self.name, title, result, len(example.sequences), notes=notes, faults=found)

    def _refused(self, title: str, row: dict[str, Any], error: RowError, tries: bool) -> Outcome:
        in_full = rendered_in_full(self.tokenizer, row)
        result = "unrendered" if in_full is None else "refused"
        made = Outcome(self.name, title, result, reason=error.reason, message=str(error), in_full=in_full)
        if result == "refused" and error.reason not in OF_ROWS:
            made.provable = provable(self.tokenizer, row, self.family.stops) if in_full else None
            if tries:
                made.helped_by = self._first(named_options(str(error)), row)
                made.unnamed = None if made.helped_by else self._first(self._pool(), row)
        return made

    def _first(self, choices: Iterator[dict[str, Any]], row: dict[str, Any]) -> str | None:
        for options in choices:
            try:
                self.encoder(**options)(row)
                return json.dumps(options)
            except (RowError, ConfigError, TypeError):
                continue
        return None

    def _pool(self) -> Iterator[dict[str, Any]]:
        yield from POOL
        for name in switches_of(self.tokenizer.chat_template):
            yield from ({"template_kwargs": {name: value}} for value in (False, True))


# Options that may let a refused row through, each alone.
POOL: tuple[dict[str, Any], ...] = (
    {"thoughts": "off"},
    {"thoughts": "empty"},
    {"thoughts": "empty_masked"},
    {"repair": "all"},
    {"border": "split"},
    {"border": "mask"},
    {"dropped": "warn"},
    {"context": "rendered"},
)


def named_options(message: str) -> Iterator[dict[str, Any]]:
    """The options that a refusal names, as in `border="split"` or `stops=["<|end|>"]`."""
    for name, value in re.findall(r"""\b([a-z_]+)=("[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\})""", message):
        try:
            yield {
                name: json.loads(value.replace("'", '"').replace("False", "false").replace("True", "true"))
            }
        except json.JSONDecodeError:
            continue


def outcomes(templates: dict[str, str], *, tries: bool = True, of_table: bool = False) -> Iterator[Outcome]:
    """Of all conversations under each template, or of those of the table alone."""
    rows = {t: r for t, r in MATRIX.items() if not of_table or t in KINDS.values()}
    for name, template in templates.items():
        family = family_of(name, template)
        if family is None or not is_there(family):
            continue
        bench = Bench(name, template, family)
        for title, row in rows.items():
            yield bench.outcome(title, row, tries=tries)


# --- the report ------------------------------------------------------------------------------------------


def report(found: list[Outcome], source: dict[str, Any]) -> dict[str, Any]:
    return {
        **source,
        "templates": len({o.template for o in found}),
        "conversations": len({o.title for o in found}),
        "pairs": len(found),
        **rates(found),
        "silent_errors": [f"{o.template}, {o.title}: {f}" for o in found for f in o.faults],
        "refused": refusals(found),
        "table": table(found),
    }


def rates(found: list[Outcome]) -> dict[str, Any]:
    given = [o for o in found if o.result in GIVEN]
    refused = [o for o in found if o.result == "refused" and o.reason not in OF_ROWS]
    contract = [o for o in refused if o.in_full]
    whole = len(given) + len(contract)
    helpable = [o for o in refused if o.helped_by or o.unnamed]
    return {
        "results": dict(Counter(o.result for o in found).most_common()),
        "split": sum(o.sequences > 1 for o in given),
        "rendered_in_full": whole,
        "refused_by_the_contract_of_those_rendered_in_full": share(len(contract), whole),
        "of_these_provable_in_some_spelling": sum(o.provable is not None for o in contract),
        "refused_as_the_template_leaves_out_part_of_a_reply": len(refused) - len(contract),
        "refusals_that_some_option_lets_through": len(helpable),
        "of_these_named_in_the_message": share(sum(o.helped_by is not None for o in helpable), len(helpable)),
    }


def refusals(found: list[Outcome]) -> dict[str, Any]:
    by: dict[str, Counter[str]] = defaultdict(Counter)
    for o in found:
        if o.result == "refused":
            by[o.reason][o.template] += 1
    return {why: {"pairs": n.total(), "templates": len(n)} for why, n in sorted(by.items())}


def table(found: list[Outcome]) -> dict[str, dict[str, str]]:
    """model × kind: trained, repaired, refused with its reason; – where the template renders nothing."""
    by = {(o.template, o.title): o for o in found}
    return {
        name: {kind: cell(by[name, title]) for kind, title in KINDS.items()}
        for name in dict.fromkeys(o.template for o in found)
    }


def cell(o: Outcome) -> str:
    if o.result == "unrendered":
        return "–"
    return f"refused: {o.reason}" if o.result == "refused" else o.result


def share(n: int, of: int) -> float:
    return round(n / of, 4) if of else 1.0


def written(found: list[Outcome]) -> str:
    """Totals and the table of models, as Markdown."""
    all_of, by_model = rates(found), table(found)
    results = all_of["results"]
    totals = {
        f"{len(by_model)} templates, {len({o.title for o in found})} conversations: pairs": len(found),
        "trained as the template writes them": results.get("trained", 0),
        "repaired, with a note": results.get("repaired", 0),
        "not rendered by the template in any spelling": results.get("unrendered", 0),
        "refused, as the template leaves out part of a reply, or the row itself is at fault": sum(
            o.result == "refused" and (o.reason in OF_ROWS or not o.in_full) for o in found
        ),
        "refused by the contract, of those rendered in full": percent(
            all_of["refused_by_the_contract_of_those_rendered_in_full"]
        ),
        "silent errors": sum(bool(o.faults) for o in found),
        "refusals that an option lets through, and that name one": percent(
            all_of["of_these_named_in_the_message"]
        ),
    }
    lines = [
        "| | |",
        "|---|---|",
        *(f"| {k} | {v:,} |" if isinstance(v, int) else f"| {k} | {v} |" for k, v in totals.items()),
    ]
    lines += ["", "✗: refused, with the reason; –: the template renders nothing.", ""]
    lines += [f"| template (source) | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for name in sorted(by_model, key=lambda n: n.partition("--")[2].lower()):
        source, _, short = name.partition("--")
        cells = (c.replace("refused: ", "✗ ") for c in by_model[name].values())
        lines.append(f"| {short} ({source}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


MARK = "<!-- {} of the matrix: benchmarks/encode_matrix.py writes it -->"


def put_between_marks(file: Path, text: str) -> None:
    """Put a text between the two marks of a document."""
    begin, end = MARK.format("beginning"), MARK.format("end")
    document = file.read_text()
    if begin not in document or end not in document:
        raise SystemExit(f"{file} has no marks {begin!r} and {end!r}")
    before, _, rest = document.partition(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def chosen_templates(choice: argparse.Namespace) -> dict[str, str]:
    if choice.templates:
        templates = {p.stem: p.read_text() for p in sorted(choice.templates.glob("*.jinja"))}
    else:
        templates = {f"trl--{n}": t for n, t in stock_templates().items() if not n.endswith("_training")}
    return {
        n: t
        for n, t in templates.items()
        if re.search(choice.only, n) and (not choice.current or n in CURRENT)
    }


def outcomes_of(choice: argparse.Namespace) -> list[Outcome]:
    """The outcomes of a file, or of the templates that are chosen, each put down as it comes."""
    if choice.of:
        return [Outcome(**json.loads(line)) for line in choice.of.read_text().splitlines()]
    found = []
    for o in outcomes(chosen_templates(choice), tries=not choice.quick, of_table=choice.table):
        found.append(o)
        if choice.details:
            with choice.details.open("a") as file:
                print(json.dumps(asdict(o), ensure_ascii=False), file=file)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--templates", type=Path, metavar="FOLDER")
    parser.add_argument("--current", action="store_true", help="templates of today's models alone")
    parser.add_argument("--table", action="store_true", help="the conversations of the table alone")
    parser.add_argument("--only", default="", metavar="REGEX", help="templates whose name it finds")
    parser.add_argument(
        "--details", type=Path, metavar="FILE", help="each outcome as a line of JSON, added to it"
    )
    parser.add_argument("--of", type=Path, metavar="FILE", help="report on such a file")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table between its marks")
    parser.add_argument("--quick", action="store_true", help="refusals aren't tried with options")
    choice = parser.parse_args()
    found = outcomes_of(choice)
    if choice.write:
        put_between_marks(choice.write, written(found))
    source = {
        "command": "python benchmarks/encode_matrix.py"
        + (" --templates FOLDER --current" if choice.current else "")
        + (" --table" if choice.table else ""),
        "sources": Counter(n.partition("--")[0] for n in {o.template for o in found}),
        "trl": version("trl"),
    }
    print(json.dumps(report(found, source), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
