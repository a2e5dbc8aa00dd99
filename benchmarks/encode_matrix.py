"""What becomes of each conversation of the test matrix under each template that TRL ships, and why.

python benchmarks/encode_matrix.py > benchmarks/results/encode-matrix.json

Every mask that is given is checked by tests/templates/checker.py, which shares nothing with the encoder. Two rates of
refusal: by the contract, of the conversations that the template renders in full; and because the template leaves out
part of a reply that would be trained, of all that it renders.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from templates.checker import faults
from templates.conversations import ALL
from templates.shelf import shelf, tokenizer_for

from ygivenx import Encoder, RowError
from ygivenx.rows.formats import normalise

DROPPED, NOT_RENDERED = "dropped_field", "template_error"


def main() -> None:
    templates = {n: t for n, t in shelf().items() if not n.endswith("_training")}
    counts: Counter[str] = Counter()
    refused: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    errors: list[str] = []
    for name, template in templates.items():
        encoder = Encoder(tokenizer_for(name, template))
        for title, row in ALL.items():
            result, said = outcome(encoder, row)
            counts[result] += 1
            errors += [f"{name}, {title}: {fault}" for fault in said if result in ("single", "split")]
            if result not in ("single", "split", NOT_RENDERED):
                refused[f"{result}: {said[0]}"][name].append(title)
    print(json.dumps(report(counts, refused, errors, len(templates)), indent=1, ensure_ascii=False))


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


def report(counts: Counter[str], refused: Any, errors: list[str], templates: int) -> dict[str, Any]:
    rendered = counts.total() - counts[NOT_RENDERED]
    whole = rendered - counts[DROPPED]
    contract = whole - counts["single"] - counts["split"]
    return {
        "command": "python benchmarks/encode_matrix.py",
        "trl": version("trl"),
        "templates": templates,
        "conversations": len(ALL),
        "pairs": counts.total(),
        "rendered": rendered,
        "counts": dict(counts.most_common()),
        "shares_of_rendered": {k: share(n, rendered) for k, n in counts.most_common() if k != NOT_RENDERED},
        "refused_by_the_contract_of_those_rendered_in_full": share(contract, whole),
        "refused_as_the_template_drops_part_of_a_trained_reply": share(counts[DROPPED], rendered),
        "silent_errors": errors,
        "refused": {
            why: {"pairs": sum(map(len, by.values())), "by_template": by}
            for why, by in sorted(refused.items())
        },
    }


def share(n: int, of: int) -> float:
    return round(n / of, 4)


if __name__ == "__main__":
    main()
