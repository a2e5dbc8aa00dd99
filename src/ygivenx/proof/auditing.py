"""The audit: a dataset, a batch or a live trainer in, findings out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..encoded import spooled, tables
from ..encoder.encode import Encoder
from ..errors import ConfigError, refuse_unknown
from ..report.parts import Finding, plain
from ..rows.data import Row
from ..sequence import Example, Rejected
from ..show import visible
from .alignment import Library
from .cures import cure, trainer_name
from .evidence import Evidence, mark_padding, seen_in_batch, seen_in_forest, seen_in_step
from .limits import Limits
from .modes import in_modes, modes_of, numbered, refused_rows
from .prepared import Prepared
from .prepared_audit import PreparedAudit
from .repeats import Repeats
from .rules import RULES, SEVERITIES, Rule
from .structure import Structure
from .tally import HitCounts

if TYPE_CHECKING:
    from torch import nn

    from .probing import Probe

CHUNK = 512  # rows that are encoded at a time
STRIPS = 200  # rows shown token by token on the page
STREAMED = 4096  # rows of a stream that a step's are looked for among: it may have no end
COLUMNS = ("messages", "prompt", "completion", "tools", "documents", "chat_template_kwargs")  # of rows


@dataclass(frozen=True)
class Report:
    """Findings, most severe first, and what they are about. `suppressed` pairs findings with reasons."""

    findings: tuple[Finding, ...]
    suppressed: tuple[tuple[Finding, str], ...]
    summary: dict[str, Any]
    evidence: Evidence = field(repr=False)

    def exit_code(self, fail_on: str = "warning") -> int:
        """1 if a finding is at least as severe as `fail_on` ("error", "warning", "info"), else 0."""
        refuse_unknown("severity", [fail_on], SEVERITIES)
        bar = SEVERITIES.index(fail_on)
        return int(any(SEVERITIES.index(f.severity) <= bar for f in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "summary": self.summary,
            "findings": [asdict(f) for f in self.findings],
            "suppressed": [{**asdict(f), "reason": reason} for f, reason in self.suppressed],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Report:
        """What `to_dict` or `to_json` gave, without the rows."""
        pairs = [({**f}, f.get("reason", "")) for f in document["suppressed"]]
        suppressed = tuple(
            (Finding(**{k: v for k, v in f.items() if k != "reason"}), why) for f, why in pairs
        )
        return cls(
            tuple(Finding(**f) for f in document["findings"]), suppressed, document["summary"], Evidence()
        )

    def to_json(self) -> str:
        """One JSON document; a number that isn't finite is null."""
        return _json(self.to_dict())

    def to_sarif(self) -> str:
        """SARIF 2.1.0 (OASIS), which code-scanning services and editors read."""
        results = [_sarif_result(f) for f in self.findings]
        results += [
            {**_sarif_result(f), "suppressions": [{"kind": "external", "justification": reason}]}
            for f, reason in self.suppressed
        ]
        driver = {
            "name": "ygivenx",
            "informationUri": "https://pypi.org/project/ygivenx/",
            "rules": [_sarif_rule(r) for r in RULES.values()],
        }
        schema = "https://json.schemastore.org/sarif-2.1.0.json"
        document = {
            "version": "2.1.0",
            "$schema": schema,
            "runs": [{"tool": {"driver": driver}, "results": results}],
        }
        return _json(document)

    def to_junit(self, fail_on: str = "warning") -> str:
        """JUnit's XML, which most CI services show: a test for each rule, failed by findings as severe as `fail_on`."""
        from xml.etree import ElementTree as xml

        bar = SEVERITIES.index(fail_on)
        suite = xml.Element("testsuite", name="ygx audit", tests=str(len(RULES)), failures="0")
        for name in RULES:
            case = xml.SubElement(suite, "testcase", classname="ygx.audit", name=name)
            found = [f for f in self.findings if f.rule == name]
            failed = [f for f in found if SEVERITIES.index(f.severity) <= bar]
            if failed:
                text = "\n".join(map(_paragraph, failed))
                xml.SubElement(case, "failure", message=_in_xml(failed[0].message)).text = _in_xml(text)
            elif found:
                xml.SubElement(case, "system-out").text = _in_xml("\n".join(map(_paragraph, found)))
            elif name in {f.rule for f, _ in self.suppressed}:
                xml.SubElement(case, "skipped")
        suite.set("failures", str(len(suite.findall("*/failure"))))
        return xml.tostring(suite, encoding="unicode", xml_declaration=True)

    def to_html(self, path: str | Path, title: str = "Audit") -> Path:
        """Write the page: findings, and the rows with their trained tokens. Returns the path."""
        from ..report import Page, made_by

        page = Page(
            title=title,
            verdict=self.summary["verdict"],
            summary={name: value for name, value in self.summary.items() if name != "verdict"},
            findings=list(self.findings),
            rows=_strips(self.evidence),
            about=made_by(),
        )
        return page.write(path)

    def __str__(self) -> str:
        head = [f"{name}: {value}" for name, value in self.summary.items()]
        body = [_paragraph(f) for f in self.findings] or ["no findings"]
        tail = [f"suppressed: {f.rule} ({reason})" for f, reason in self.suppressed]
        return visible("\n".join([*head, *body, *tail]))  # rows may hold a terminal's commands


def audit(
    rows: Iterable[Any] | None = None,
    encoder: Any = None,
    *,
    labels: str | Path | None = None,
    batch: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
    probe: Probe | None = None,
    model: nn.Module | Limits | None = None,
    trainer: Any = None,
    suppress: Mapping[str, str] | None = None,
) -> Report:
    """Findings about whatever is given; each further thing lets more rules speak.

    rows + encoder: the data as the contract reads it; a reader's Rejected counts as quarantined. labels: a prepared
    set, alone with an encoder or against the rows that it was made of (see `audit_prepared`). batch: one
    collated batch, or a step's list of them, by their labels. probe: a step that was probed. model: its limits
    and stop tokens, and what leaks between the documents of a batch; or the Limits of one that isn't loaded.
    trainer: a transformers trainer, of which one step is rehearsed (see `rehearse`; nothing of it changes; in a
    process group all ranks have to call this); rows default to those in its dataset's own columns (of a stream, to
    its first), the encoder to one of its tokenizer.
    suppress: rule id → why it doesn't apply here; the finding is listed apart and doesn't fail the audit.

    Raises ConfigError for a rule id that doesn't exist, a suppression without a reason, or rows without an encoder.
    """
    suppress = dict(suppress or {})
    _check_suppressions(suppress)
    if labels is not None:
        limits = None if model is None else _limits_of(model)
        return audit_prepared(Prepared(labels), rows, encoder, limits=limits, suppress=suppress)
    evidence = _gather(rows, encoder, batch, probe, model, trainer)
    tally = HitCounts()
    tally.add(evidence)
    return _report(tally, _summary(evidence), evidence, suppress, trainer_name(trainer))


def audit_prepared(
    prepared: Prepared,
    rows: Iterable[Any] | None = None,
    encoder: Encoder | None = None,
    *,
    tokenizer: Any = None,
    limits: Limits | None = None,
    suppress: Mapping[str, str] | None = None,
) -> Report:
    """Findings about a prepared set of any size: what its labels train, against what inference shows of its rows.

    rows + encoder: what the set was made of; rows is iterated over more than once. Without rows, a tokenizer: what
    can be known of ids alone, by the headers that its chat template writes. limits: of the model, for its stops.
    Memory holds a part of either at a time, and a few hundred bytes for each row.

    Raises ConfigError for rows without an encoder, or neither encoder nor tokenizer.
    """
    suppress = dict(suppress or {})
    _check_suppressions(suppress)
    if encoder is None and (rows is not None or tokenizer is None):
        raise ConfigError("a prepared set, and no encoder or tokenizer to read it with")
    tokenizer = encoder.tokenizer if encoder is not None else tokenizer
    run = PreparedAudit(prepared, tokenizer, limits or Limits())
    if rows is not None and encoder is not None:
        run.with_rows(rows, encoder)
    else:
        run.without_rows()
    evidence = Evidence(tokenizer=tokenizer, labels=run.shown)
    return _report(run.tally, _prepared_summary(run.counts, rows is not None), evidence, suppress)


def _report(
    tally: HitCounts,
    summary: dict[str, Any],
    evidence: Evidence,
    suppress: Mapping[str, str],
    trainer: str = "",
) -> Report:
    findings = [replace(f, fix=cure(trainer, f.rule, f.fix)) for f in tally.findings()]
    kept = tuple(f for f in findings if f.rule not in suppress)
    suppressed = tuple((f, suppress[f.rule]) for f in findings if f.rule in suppress)
    return Report(kept, suppressed, {"verdict": verdict(kept), **summary}, evidence)


def verdict(findings: Iterable[Finding]) -> str:
    """The report in one line: how many errors and warnings, and their names, the worst first."""
    by_severity: dict[str, list[str]] = {}
    for f in findings:
        by_severity.setdefault(f.severity, []).append(f.rule)
    names = [name for s in SEVERITIES[:2] for name in by_severity.get(s, ())]
    if not names:
        return "sound: nothing above info"
    counts = [
        f"{len(by_severity[s])} {s}{'s' * (len(by_severity[s]) > 1)}"
        for s in SEVERITIES[:2]
        if s in by_severity
    ]
    return f"{' and '.join(counts)}: {', '.join(dict.fromkeys(names))}"


def _prepared_summary(counts: Mapping[str, int], with_rows: bool) -> dict[str, Any]:
    summary: dict[str, Any] = {k: counts[k] for k in ("rows", "accepted", "quarantined") if k in counts}
    read = counts.get("prepared rows", 0)
    known = f"{counts.get('recognised', 0):,} of {read - counts.get('unreadable', 0):,}"
    return summary | {
        "prepared rows": read,
        "unreadable": counts.get("unreadable", 0),
        "trained tokens by": "labels",
        "x and y by": "the rows" if with_rows else "the template's headers",
        "tokens": counts.get("tokens", 0),
        "trained": counts.get("trained", 0),
        "trained share": round(counts.get("trained", 0) / max(counts.get("tokens", 0), 1), 4),
        "rows recognised": known,
    }


# -- evidence ---------------------------------------------------------------------------------------------


def _gather(rows: Any, encoder: Any, batch: Any, probed: Any, model: Any, trainer: Any) -> Evidence:
    """Everything that the rules look at. The order matters: rows are read first, as all else is aligned with them."""
    ev = Evidence(probe=probed)
    if trainer is not None and model is None:
        model = trainer.model
    encoder = _read_rows(ev, rows, encoder, trainer)
    _add_limits(ev, model, trainer)
    if trainer is not None:
        batch = _rehearse(ev, trainer)
    batches = [] if batch is None else [batch] if isinstance(batch, Mapping) else list(batch)
    _observe(ev, batches)
    align(ev, encoder)
    _add_denominators(ev, trainer)
    module = trainer.model if trainer is not None else model
    if batches and module is not None and not isinstance(module, Limits):
        from .leaks import leaks_in

        ev.leaks = leaks_in(ev.seen, module, batches)
    return ev


def _read_rows(ev: Evidence, rows: Any, encoder: Encoder | None, trainer: Any) -> Encoder | None:
    """The rows as the encoder reads them, by default those that a trainer's data set still carries; the encoder."""
    if trainer is not None:
        ev.tokenizer = tokenizer_of(trainer)
        rows = _rows_of(trainer) if rows is None else rows
        if encoder is None and rows is not None and ev.tokenizer is not None:
            encoder = Encoder(ev.tokenizer)
    if rows is not None and encoder is None:
        raise ConfigError(
            "rows, and no encoder to read them with",
            why="which tokens are x and which are y is the encoder's to say: nothing could be judged",
            fix="yx.audit(rows, yx.Encoder(tokenizer), ...)",
        )
    if encoder is not None:
        ev.tokenizer = encoder.tokenizer
    if rows is not None and encoder is not None:
        if isinstance(rows, list):  # they can be rendered again, in other modes
            ev.rows = [r for r in numbered(rows) if isinstance(r, Row)]
        ev.encoded = spooled(tables(_encoded(ev, iter(rows), encoder)))
        ev.repeats = Repeats.of(ev.encoded)
        ev.empty = () if ev.read else ("the rows",)
    return encoder


def _encoded(ev: Evidence, rows: Iterator[Any], encoder: Any) -> Iterator[Example]:
    """The accepted rows; the evidence counts all of them and keeps what is refused. A reader's rows come in chunks."""
    first = next(rows, None)
    rows, size = chain([] if first is None else [first], rows), CHUNK
    if not isinstance(first, Row | Rejected):  # they have no numbers but their places in one batch
        rows = iter(every := list(rows))
        size = max(1, len(every))
    while chunk := list(islice(rows, size)):
        ev.scored += _scored(chunk, ev.read)
        ev.read += len(chunk)
        # Whole, not row by row: a row that is refused doesn't end the audit, it is evidence.
        examples, rejected = encoder.batch(r for r in chunk if not isinstance(r, Rejected))
        unread = [r for r in chunk if isinstance(r, Rejected)]
        ev.rejected += [replace(r, row=None) for r in (*unread, *rejected)]
        yield from examples


def _scored(rows: list[Any], first: int) -> Iterator[tuple[int, float, float]]:
    for i, row in enumerate(rows, first):
        raw = row.raw if isinstance(row, Row) else row
        joint, x = (raw.get(k) if isinstance(raw, Mapping) else None for k in ("log_p_xy", "log_p_x"))
        if isinstance(joint, int | float) and isinstance(x, int | float):
            yield i, float(joint), float(x)


def _observe(ev: Evidence, batches: list[Mapping[str, Any]]) -> None:
    """What the batches say by their labels and the probe by its gradient."""
    ev.labels = [s for i, b in enumerate(batches) if "labels" in b for s in seen_in_batch(b, i)]
    if ev.probe is not None and not ev.steps:  # a rehearsal has filled them in already
        ev.steps = [s for i, b in enumerate(ev.probe.micro_batches) for s in seen_in_step(i, b)]


def _add_denominators(ev: Evidence, trainer: Any) -> None:
    # By sequence, tokens are meant to weigh differently: that is what our own trainer was configured for.
    if not ev.steps or getattr(trainer, "denominator", None) == "sequence":
        return
    from .rehearsal import denominators

    # A batch or a probe may be audited on one rank alone; a trainer's step needs all of them anyway.
    ev.denominators = denominators(ev.steps, gather=trainer is not None)


def _add_limits(ev: Evidence, model: Any, trainer: Any) -> None:
    if model is None:
        return
    ev.context_length, ev.stop_ids = _limits_of(model)
    eos = getattr(ev.tokenizer, "eos_token_id", None)
    if trainer is not None and eos is not None:  # train() adds it to the generation config
        ev.stop_ids |= {eos}


def _limits_of(model: Any) -> Limits:
    """The limits of a model, or those that were given as such."""
    if isinstance(model, Limits):
        return model
    from .wrapping import unwrap

    core = unwrap(model)
    return Limits.of(core.config, core.generation_config)


def _rehearse(ev: Evidence, trainer: Any) -> list[dict[str, Any]]:
    from .rehearsal import rehearse, unrehearsed

    run, ev.unrehearsed = rehearse(trainer), unrehearsed(trainer)
    ev.probe, ev.evaluation = run.probe, run.evaluation
    for i, (batch, probed) in enumerate(zip(run.batches, run.probe.micro_batches, strict=True)):
        if "forest" in batch:  # ours
            sequences = [trainer.train_dataset.sequence(m) for m in batch["forest"].members]
            ev.steps += seen_in_forest(i, probed, batch["forest"], sequences)
        else:
            ev.steps += seen_in_step(i, probed)
    return run.batches


def align(ev: Evidence, encoder: Encoder | None) -> None:
    """Find the rows' sequences in what was seen; where some aren't, in other modes and of refused rows, too."""
    seen_rows = [*ev.steps, *ev.labels]
    if not seen_rows:
        return
    if not ev.read and getattr(ev.tokenizer, "chat_template", None):
        structure = Structure(ev.tokenizer, ev.stop_ids)
        for seen in seen_rows:
            structure.mark(seen)
    examples = list(ev.examples)
    exact = {s.ids.tobytes() for e in examples for s in e.sequences}
    if encoder is not None and any(s.ids[s.attended].tobytes() not in exact for s in seen_rows):
        examples = [*_with_modes(ev, encoder), *refused_rows(ev.rows, set(ev.encoded.row.tolist()), encoder)]
    library = Library(examples, seen_rows)
    pad = getattr(ev.tokenizer, "pad_token_id", None)
    for seen in seen_rows:
        library.align(seen)
        mark_padding(seen, pad)


def _with_modes(ev: Evidence, encoder: Encoder) -> Iterator[Example]:
    """The examples, each with its sequences in the other modes of its template."""
    modes = modes_of(encoder)
    rows = {r.index: r for r in ev.rows if isinstance(r, Row)} if modes else {}
    for example in ev.examples:
        row = rows.get(-1 if example.index is None else example.index)
        others = [s for e in in_modes(row, modes) for s in e.sequences] if row is not None else []
        yield replace(example, sequences=(*example.sequences, *others))


def tokenizer_of(trainer: Any) -> Any:
    """A trainer's tokenizer, inside a processor too; its collator's where it has none; None without."""
    given = trainer.processing_class or trainer.data_collator
    return getattr(given, "tokenizer", trainer.processing_class)


def _rows_of(trainer: Any) -> list[Any] | None:
    """The rows that a trainer's dataset still carries beside its token ids; of a stream, its first ones."""
    columns = getattr(trainer.train_dataset, "column_names", None) or []
    kept = [c for c in COLUMNS if c in columns]
    if "messages" not in kept and not {"prompt", "completion"} <= set(kept):
        return None
    rows = trainer.train_dataset.select_columns(kept)
    # A stream may have no end.
    return list(rows if hasattr(rows, "__len__") else islice(rows, STREAMED))


# -- report -----------------------------------------------------------------------------------------------


def _check_suppressions(suppress: Mapping[str, str]) -> None:
    refuse_unknown("rule", suppress, RULES, "suppress")
    for name, reason in suppress.items():
        if not reason.strip():
            raise ConfigError(f"the suppression of {name!r} has no reason", where="suppress", fix="say why")


def _summary(ev: Evidence) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    if ev.read:
        summary |= {"rows": ev.read, "accepted": ev.accepted, "quarantined": len(ev.rejected)}
    if ev.seen:
        tokens = sum(int(s.attended.sum()) for s in ev.seen)
        trained = sum(int(s.trained.sum()) for s in ev.seen)
        summary |= {
            "trained tokens by": "the gradient of a step" if ev.steps else "labels",
            "tokens": tokens,
            "trained": trained,
            "trained share": round(trained / max(tokens, 1), 4),
            "rows recognised": f"{sum(bool(s.pieces) for s in ev.seen):,} of {len(ev.seen):,}",
        }
    if ev.unrehearsed:
        summary["not rehearsed"] = ", ".join(ev.unrehearsed)
    if ev.probe is not None:
        summary |= {"Σ weights of the step": round(ev.probe.weight_sum, 6), "weights": ev.probe.weighting}
    return summary


def _paragraph(f: Finding) -> str:
    share = f" ({f.share:.1%})" if f.share is not None else ""
    count = f"{f.count:,} " if f.count is not None else ""
    lines = [f"{f.severity} [{f.rule}] {count}{f.message}{share}"]
    for example in f.examples:
        lines.append("    " + ": ".join(" ".join(str(v).split()) for v in example.values()))
    return "\n".join([*lines, f"  why: {f.why}", f"  fix: {f.fix}"])


def _strips(ev: Evidence) -> list[Any]:
    from ..report import TokenStrip

    text = cache(lambda i: ev.text([i]))  # decoding a token takes tens of microseconds, and most come again
    strips = [
        TokenStrip(
            title=s.where,
            tokens=[text(i) for i in s.ids.tolist()],
            weights=s.weight.tolist(),
            log_p=[None] * len(s.ids),
            kinds=[k or "token" for k in s.kinds],
            ids=s.ids.tolist(),
        )
        for s in ev.seen[:STRIPS]
    ]
    if strips:
        return strips
    shown = enumerate(islice(ev.encoded, STRIPS))
    return [
        TokenStrip.of(replace(s, tokens=tuple(map(text, s.ids.tolist()))), title=ev.encoded.name(n))
        for n, s in shown
    ]


def _json(document: Any) -> str:
    return json.dumps(plain(document), ensure_ascii=False, indent=1, allow_nan=False)


def _in_xml(text: str) -> str:
    """A text without the characters that XML 1.0 has no way to write."""
    return "".join(
        c if c in "\t\n" or (c >= " " and not "\ud800" <= c <= "\udfff" and c not in "\ufffe\uffff") else "�"
        for c in text
    )


def _sarif_rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.id.replace("-", " ")},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.fix},
        "defaultConfiguration": {"level": _sarif_level(rule.severity)},
    }


def _sarif_level(severity: str) -> str:
    return "note" if severity == "info" else severity


def _sarif_result(f: Finding) -> dict[str, Any]:
    text = _paragraph(f).split("\n", 1)[0]
    return {
        "ruleId": f.rule,
        "level": _sarif_level(f.severity),
        "message": {"text": text},
        "locations": [
            {"logicalLocations": [{"fullyQualifiedName": str(e["where"])}]}
            for e in f.examples
            if "where" in e
        ],
        "properties": {"count": f.count, "share": f.share, "examples": list(f.examples)},
    }


__all__ = ["Example", "Finding", "Report", "audit"]
