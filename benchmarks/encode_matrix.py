"""What becomes of each conversation of the test matrix under each template that TRL ships, and why.

python benchmarks/encode_matrix.py > benchmarks/results/encode-matrix.json
python benchmarks/encode_matrix.py --templates FOLDER > benchmarks/results/encode-matrix-elsewhere.json

Every mask that is given is checked by tests/templates/checker.py, which shares nothing with the encoder. Two rates of
refusal: by the contract, of the conversations that the template renders in full; and because the template leaves out
part of a reply that would be trained, of all that it renders. `--templates` takes a folder of others, named
SOURCE--NAME.jinja: they aren't ours to ship, so that the report has how many each source gave, and counts alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from templates.checker import faults
from templates.conversations import ALL
from templates.stock import stock_templates, stops_for, tokenizer_for

from ygivenx import Encoder, RowError
from ygivenx.rows.formats import normalise

DROPPED, NOT_RENDERED = "dropped_field", "template_error"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--templates", type=Path, metavar="FOLDER")
    folder = parser.parse_args().templates
    templates = elsewhere(folder) if folder else stock()
    found, mended = taken(templates, "default"), taken(templates, "all")
    sources = Counter(n.partition("--")[0] for n in templates) if folder else None
    made = report(found, templates, sources) | {"with_every_repair": rates(mended)}
    print(json.dumps(made, indent=1, ensure_ascii=False))


def taken(templates: dict[str, str], repair: str) -> Found:
    found = Found()
    for name, template in templates.items():
        options = {"repair": repair, "stops": stops_for(name)}
        encoder = Encoder(tokenizer_for(name, template), **options)
        for title, row in ALL.items():
            if encoder.dated:  # the checker renders at the present, and one template writes the seconds
                encoder = Encoder(encoder.tokenizer, **options)
            found.take(name, title, *outcome(encoder, row))
    return found


def stock() -> dict[str, str]:
    return {n: t for n, t in stock_templates().items() if not n.endswith("_training")}


def elsewhere(folder: Path) -> dict[str, str]:
    return {p.stem: p.read_text() for p in sorted(folder.glob("*.jinja"))}


class Found:
    """What became of the pairs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.errors: list[str] = []

    def take(self, name: str, title: str, result: str, said: list[str]) -> None:
        self.counts[result] += 1
        if result in ("single", "split"):
            self.errors += [f"{name}, {title}: {fault}" for fault in said]
        elif result != NOT_RENDERED:
            self.refused[f"{result}: {said[0]}"][name].append(title)


def outcome(encoder: Encoder, row: dict[str, Any]) -> tuple[str, list[str]]:
    """The class of a mask and its faults, or the reason of a refusal and what it says."""
    try:
        example = encoder(row)
    except RowError as e:
        field = e.field.rpartition(".")[2].partition("[")[0] if e.reason == DROPPED else ""
        return e.reason, [f"{e.what}{' (' + field + ')' if field else ''}"]
    normal = {**row, "messages": normalise(row).messages}
    kind = "single" if len(example.sequences) == 1 else "split"
    return kind, faults(encoder.tokenizer, normal, example)


def report(found: Found, templates: Iterable[str], sources: Counter[str] | None) -> dict[str, Any]:
    counts = found.counts
    return {
        "command": " ".join(
            ["python", "benchmarks/encode_matrix.py", *(["--templates FOLDER"] if sources else [])]
        ),
        **({"sources": sources} if sources else {"trl": version("trl")}),
        "templates": len(list(templates)),
        "conversations": len(ALL),
        "pairs": counts.total(),
        **rates(found),
        "refused": {
            why: {"pairs": sum(map(len, by.values())), **({"by_template": by} if not sources else {})}
            for why, by in sorted(found.refused.items())
        },
    }


def rates(found: Found) -> dict[str, Any]:
    counts = found.counts
    rendered = counts.total() - counts[NOT_RENDERED]
    whole = rendered - counts[DROPPED]
    contract = whole - counts["single"] - counts["split"]
    return {
        "rendered": rendered,
        "counts": dict(counts.most_common()),
        "shares_of_rendered": {k: share(n, rendered) for k, n in counts.most_common() if k != NOT_RENDERED},
        "refused_by_the_contract_of_those_rendered_in_full": share(contract, whole),
        "refused_as_the_template_drops_part_of_a_trained_reply": share(counts[DROPPED], rendered),
        "silent_errors": found.errors,
    }


def share(n: int, of: int) -> float:
    return round(n / of, 4)


if __name__ == "__main__":
    main()
