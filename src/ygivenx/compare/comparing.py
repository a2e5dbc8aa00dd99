"""Who trains what: each trainer's tokens of each row, judged by the audit's rules, with our proof beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..encoded import EncodedRows
from ..encoder.encode import Encoder
from ..errors import ConfigError
from ..proof.auditing import align
from ..proof.cures import cure
from ..proof.evidence import Evidence, mark_padding
from ..proof.modes import numbered
from ..proof.rules import RULES
from ..proof.rules.shared import around
from ..proof.tally import HitCounts
from ..report.parts import Finding, TokenStrip
from ..rows.data import Row
from ..rows.nouns import Conversation
from ..sequence import Rejected
from ..sequence import Sequence as Tokens
from ..show import coloured
from .running import Preprocessed, run
from .trainers import trainer_of

OURS = "ygivenx"
LEFT_OUT = (
    "duplicates",
    "conflicting-answers",
    "length-outliers",
    "rows-missing",
    "encoder-notes",
    "y-empty",
)


@dataclass(frozen=True)
class Cell:
    """What one trainer with one setting makes of one row, and what the audit says of it.

    outcome: "exact" (the tokens that are trained are those of our sequences, each after the same ids),
    "after-end-trained" (so but for white space behind the end of a turn), "refused" (nothing was made of it),
    "refused here" (our encoder has no proof, so that loss on x alone is judged), "another-mode", or the rules that
    found something.
    """

    result: Preprocessed
    outcome: str
    findings: tuple[Finding, ...]

    @property
    def title(self) -> str:
        return f"row {self.result.row}, {self.result.trainer} ({self.result.setting}): {self.outcome}"


def as_messages(row: Row) -> dict[str, Any]:
    """A row as other trainers take it; raises ConfigError for one that is no conversation."""
    value = row.value
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, Conversation):
        raise ConfigError(
            "trainers are compared on conversations", where=row.where, fix="give rows with messages"
        )
    tools = {"tools": value.tools} if value.tools else {}
    return {"messages": [dict(m) for m in value.messages], **tools}


def compare(
    rows: Iterable[Any], encoder: Encoder, places: Mapping[str, str], settings: Sequence[str] | None = None
) -> Iterator[Cell]:
    """A cell for each row, first ours, then each trainer's with each of its settings (or with those named).

    places: where each trainer is installed, "" for this Python. Raises ConfigError where one can't be run.
    """
    given = [r for r in numbered(rows) if isinstance(r, Row)]
    yield from (ours(encoder, row, n) for n, row in enumerate(given))
    theirs = [as_messages(r) for r in given]
    for trainer, place in places.items():
        chosen = [s for s in trainer_of(trainer).settings if settings is None or s in settings]
        for result in run(trainer, chosen, [encoder.tokenizer], theirs, place) if chosen else ():
            yield judge(result, given[result.row], encoder)


def judge(result: Preprocessed, row: Row, encoder: Encoder) -> Cell:
    """What the audit's rules say of what was made of a row."""
    if result.error:
        return Cell(result, "refused", ())
    examples, rejected = encoder.batch([row])
    ev = Evidence(
        rows=[row], encoded=EncodedRows.of(examples), rejected=list(rejected), tokenizer=encoder.tokenizer
    )
    ev.labels = [result.observed()]
    align(ev, encoder)
    for seen in ev.labels:
        mark_padding(seen, encoder.tokenizer.pad_token_id)
    tally = HitCounts()
    tally.add(ev, leave_out=LEFT_OUT)
    found = [f for f in tally.findings() if not _is_refusal(f, rejected)]
    if _outcome(found, bool(rejected)) in ("exact", "after-end-trained"):
        found += _differing(result, examples[0].sequences, ev)
    findings = tuple(replace(f, fix=cure(result.trainer, f.rule, f.fix)) for f in found)
    return Cell(result, _outcome(findings, bool(rejected)), findings)


def _differing(result: Preprocessed, sequences: Sequence[Tokens], ev: Evidence) -> Iterator[Finding]:
    """What the rules let pass, as they align documents: a trained token after other ids than ours, or one too few.

    White space behind the end of a turn may be trained.
    """
    ids, trained = result.ids, result.weights > 0
    passed, apart, lost = np.zeros(len(ids), bool), 0, []
    for s in sequences:
        size = min(len(ids), len(s))
        same = int(np.append(ids[:size] == s.ids[:size], False).argmin())
        apart = max(apart, same)
        passed[:same] |= s.weights[:same] > 0
        behind = np.flatnonzero(s.of_kind("end_of_turn")[:same]) + 1
        passed[[t for t in behind if t < len(ids) and ev.text(ids[t : t + 1]).isspace()]] = True
        lost.append(bool((s.weights[:same] > 0)[~trained[:same]].any() or (s.weights[same:] > 0).any()))
    wrong = np.flatnonzero(trained & ~passed)
    if len(wrong):
        at = min(int(wrong[0]), apart)
        message = "rows differ from what the chat template shows at inference"
        where = {"where": f"{ev.labels[0].where}, token {at}", "text": around(ev, ids, at)}
        yield _finding("context-differs", message, len(wrong) / int(trained.sum()), where)
    elif any(lost):
        which = "y" if lost[-1] else "earlier replies"
        rule = "y-untrained" if lost[-1] else "only-last-turn"
        where = {"where": ev.labels[0].where, "text": ev.text(sequences[lost.index(True)].ids[-12:])}
        yield _finding(rule, f"tokens of {which} are not trained", sum(lost) / len(lost), where)


def _finding(name: str, message: str, share: float, example: Mapping[str, str]) -> Finding:
    rule = RULES[name]
    return Finding(name, rule.severity, message, 1, share, (example,), rule.why, rule.fix)


def _is_refusal(finding: Finding, rejected: list[Rejected]) -> bool:
    """Whether a finding is about the row alone, as our encoder refuses it, and says nothing of the trainer."""
    return bool(rejected) and any(str(e.get("where", "")).startswith("row ") for e in finding.examples)


def _outcome(findings: Iterable[Finding], refused: bool) -> str:
    rules = list(dict.fromkeys(f.rule for f in findings if f.severity != "info"))
    if rules:
        return ", ".join(rules)
    if refused:
        return "refused here"
    infos = {f.rule for f in findings}
    return next((rule for rule in ("another-mode", "after-end-trained") if rule in infos), "exact")


def ours(encoder: Encoder, row: Row, number: int) -> Cell:
    """Our own sequences of a row: the last one where there are several, which holds all messages."""
    examples, rejected = encoder.batch([row])
    if rejected:
        result = Preprocessed(OURS, "default", number, np.zeros(0, np.int64), np.zeros(0), rejected[0].reason)
        return Cell(result, f"refused: {rejected[0].reason}", ())
    sequences = examples[0].sequences
    result = Preprocessed(OURS, "default", number, sequences[-1].ids, sequences[-1].weights.astype(float))
    return Cell(result, "exact" if len(sequences) == 1 else f"exact, {len(sequences)} sequences", ())


def in_terminal(cell: Cell, tokenizer: Any) -> str:
    """A cell as coloured text: who, what comes of it, and the trained tokens marked."""
    if cell.result.error:
        return f"{cell.title}\n{cell.result.error}"
    return f"{cell.title}\n{coloured(_texts(cell, tokenizer), cell.result.weights)}"


def strip(cell: Cell, tokenizer: Any) -> TokenStrip:
    """A cell for the page."""
    ids = cell.result.ids.tolist()
    notes = (
        [cell.result.error]
        if cell.result.error
        else [f"{f.rule}: {f.message}; fix: {f.fix}" for f in cell.findings]
    )
    return TokenStrip(
        title=cell.title, tokens=_texts(cell, tokenizer), weights=cell.result.weights.tolist(), log_p=[None] * len(ids),
        kinds=["token"] * len(ids), ids=ids, notes=notes,
    )  # fmt: skip


def _texts(cell: Cell, tokenizer: Any) -> list[str]:
    return [tokenizer.decode([i]) for i in cell.result.ids.tolist()]
