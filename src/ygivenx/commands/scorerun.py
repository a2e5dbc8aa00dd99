"""Rows of a file to scores: numbered, in input order, resumable; what can't be scored is counted by reason."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from .. import __version__
from ..choices import Bos
from ..disk import locked, writing
from ..errors import ModelError, RowError
from ..models.resolve import located, revision_of
from ..rows.formats import normalise
from ..scores.choices import Accuracy, gold_of
from ..scores.requests import Request, RequestBuilder
from ..scores.scorefile import ScoreFile, run_before
from ..sequence import Rejected
from ..show import plural, visible_json
from .config import RowOptions, Scoring, Weights
from .inputs import Account, open_model, open_rows, say
from .progress import shown
from .quiet import quiet

INTERRUPTED = 130  # what shells call a program that Ctrl-C ended
# What scores requests: it may read ahead, and answers in order.
AnswerStream = Callable[[Iterator[Request]], Iterator[Any]]


class Numbered(NamedTuple):
    """A request, the row that it comes from and which of that row's it is (from 0), and whether it is the gold one."""

    row: int
    sequence: int
    request: Request
    gold: bool | None = None


@dataclass
class Rows:
    """The requests of a reader's rows. Each row is accepted or quarantined, and the account counts them.

    columns: the names of x and y, and whether they are plain text, as the reader was opened with; a row
    whose y is a list of texts asks a request for each.
    """

    reader: Any
    builder: RequestBuilder
    columns: tuple[str | None, str | None, bool] = (None, None, False)
    account: Account = field(default_factory=lambda: Account(""))

    def __iter__(self) -> Iterator[Numbered]:
        self.account = Account(self.reader.format, self.account.quarantine)
        for number, item in enumerate(self.reader):
            try:
                requests = [q for value in self._values(item) for q in self.builder(value)]
                gold = self._gold(item, len(requests))
            except RowError as error:
                if error.where in ("", error.field):
                    # The reader stumbled over the list of replies and names its column, which isn't at fault here.
                    place = item.where.removesuffix(f", {self._choices(_raw(item))[0]}")
                    error.where = ", ".join(filter(None, (place, error.field)))
                self.account.reject(Rejected(_raw(item), error.reason, error.where, str(error)))
                continue
            if requests:
                self.account.accept()
            for k, request in enumerate(requests):
                yield Numbered(number, k, request, None if gold is None else k == gold)

    def _values(self, item: Any) -> list[Any]:
        """What a row asks; nothing if it is quarantined."""
        if not isinstance(item, Rejected):
            return [item.value]
        x, y, plain = self.columns
        column, several = self._choices(item.row)
        if not several:
            self.account.reject(item)
            return []
        columns = (x, y) if x and y else None
        as_text = plain and columns is not None
        return [normalise(item.row | {column: v}, columns=columns, as_text=as_text) for v in several]

    def _choices(self, row: Any) -> tuple[str, list[str]]:
        """The column of y and its texts, where it is a list of several; else none."""
        column = self.columns[1] or next((c for c in ("y", "completion", "answer") if c in (row or ())), "")
        several = row.get(column) if isinstance(row, dict) else None
        if not isinstance(several, list) or not all(isinstance(v, str) for v in several):
            return column, []
        return column, several

    def _gold(self, item: Any, count: int) -> int | None:
        """Which of a row's requests is the right one, where it says so."""
        row = _raw(item)
        column, several = self._choices(row)
        if not several or row.get("gold") is None or column == "gold":
            return None
        if count != len(several):
            raise RowError("a choice has several renderings", reason="several_scores", field=column)
        return gold_of(row["gold"], several)


def _raw(item: Any) -> Any:
    return item.row if isinstance(item, Rejected) else item.raw


def records(numbered: Iterable[Numbered], scorer: AnswerStream) -> Iterator[dict[str, Any]]:
    """One record per request, in order; `scorer` makes Scores of requests, reading ahead as it likes."""
    # The scorer reads ahead, so rows wait here until their scores come, in the same order.
    waiting: deque[tuple[int, int, dict[str, bool]]] = deque()

    def requests() -> Iterator[Request]:
        for n in numbered:
            waiting.append((n.row, n.sequence, {} if n.gold is None else {"gold": n.gold}))
            yield n.request

    try:
        for score in scorer(requests()):
            row, sequence, gold = waiting.popleft()
            yield {"row": row, "sequence": sequence, **gold, **score.to_dict()}
    except ModelError as error:
        if waiting:
            error.where = f"rows {waiting[0][0]} to {waiting[-1][0]}, {error.where}".removesuffix(", ")
        raise


@dataclass
class Means:
    """Sums over records, as they pass. impossible: y's of probability 0, whose log p JSON has no number for."""

    sums: Counter[str] = field(default_factory=Counter)
    log_p_y: float = 0.0
    accuracy: Accuracy = field(default_factory=Accuracy)

    def over(self, stream: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same records, added up."""
        for r in stream:
            self.add(r)
            yield r

    def add(self, r: dict[str, Any]) -> None:
        """Add one record up."""
        self.sums["records"] += 1
        for name in ("scored", "bytes", "words", "greedy"):
            self.sums[name] += r[name]
        self.log_p_y += r["log_p_y_given_x"] or 0.0
        self.sums["impossible"] += r["log_p_y_given_x"] is None
        self.accuracy.add(r)

    def to_dict(self) -> dict[str, Any]:
        """Of all y's together: nats and perplexity per token, bits per byte and per word; None for no number."""

        def per(unit: str, factor: float = 1.0) -> float | None:
            finite = self.sums[unit] and not self.sums["impossible"]
            return -self.log_p_y * factor / self.sums[unit] if finite else None

        nats, bits = per("scored"), 1 / math.log(2)
        return {
            "scored": self.sums["records"],
            "tokens_y": self.sums["scored"],
            "conditional_nats_per_token": nats,
            # exp(709.8) is the largest float64.
            "perplexity": None if nats is None or nats > 709 else math.exp(nats),
            "bits_per_byte": per("bytes", bits),
            "bits_per_word": per("words", bits),
            "greedy": self.sums["greedy"],
            "impossible": self.sums["impossible"],
            **self.accuracy.to_dict(),
        }


def run(
    rows: Rows,
    scorer: AnswerStream,
    tally: Any,
    file: ScoreFile | None,
    console: Console,
    silent: bool = False,
) -> dict[str, Any]:
    """Score all rows, into a file or on standard output as JSON Lines unless `silent`; the account of the run.

    What the file holds already isn't scored again. Progress goes to the console.
    """
    means = Means()
    numbered = iter(rows)
    if file is not None:
        numbered = _after(file, numbered, means, console)
    fresh = records(numbered, scorer)
    total = sum(1 for _ in rows.reader)
    tracked = means.over(shown(console, fresh, lambda: f"scoring: {tally}", lambda r: r["row"] + 1, total))
    if file is not None:
        file.write(tracked)
    else:
        for record in tracked:
            if not silent:
                print(visible_json(json.dumps(record, ensure_ascii=False, allow_nan=False)), flush=True)
    account = rows.account.close() | means.to_dict() | {"run": tally.to_dict()}
    if file is not None:
        file.finish(account)
    return account


def _after(
    file: ScoreFile, numbered: Iterator[Numbered], means: Means, console: Console
) -> Iterator[Numbered]:
    """The requests behind those that the file has scores of, matched by row and sequence.

    Where a score is missing in between, what follows it is cut off and computed again.
    """
    for kept, record in enumerate(file.records()):
        request = next(numbered, None)
        if request is None or (record["row"], record["sequence"]) != (request.row, request.sequence):
            gap = "behind the last row" if request is None else f"of row {request.row}"
            say(
                f"the score {gap} isn't where it belongs: {file.done - kept:,} scores are computed again",
                console,
            )
            file.keep(kept)
            return numbered if request is None else chain([request], numbered)
        means.add(record)
    return numbered


def score_file(
    data: str, weights: Weights, columns: RowOptions, scoring: Scoring, output: Path | None, *, ray: int = 0,
    console: Console, silent: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`ygx score`: the rows of a file by a model; the account, which is printed too.

    `silent` keeps the records off standard output where there is no file for them.
    """
    with ExitStack() as stack:
        if output is not None:
            fix = "make room; run it again to go on behind the scores that are there"
            stack.enter_context(writing(output, fix))
            output.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output, "ygx score"))
        stack.enter_context(quiet(weights.verbose))
        try:
            return _score_file(data, weights, columns, scoring, output, ray, console, silent)
        except KeyboardInterrupt:
            kept = (
                f"{_lines_in(output):,} scores are in {output}: run it again to go on"
                if output
                else "nothing is kept"
            )
            say(f"interrupted: {kept}", console)
            raise SystemExit(INTERRUPTED) from None


def _lines_in(output: Path) -> int:
    lines = output.with_name(output.name + ".jsonl") if output.suffix == ".parquet" else output
    if not lines.exists():
        return 0
    with lines.open("rb") as file:
        return sum(1 for _ in file)


def _score_file(
    data: str, weights: Weights, columns: RowOptions, scoring: Scoring, output: Path | None, ray: int,
    console: Console, silent: bool,
) -> dict[str, Any]:  # fmt: skip
    from ..scores.scoring import Details, Tally, request_builder_for, scores

    reader = open_rows(data, columns)
    place = located(str(weights.path), weights.gguf_file)
    # What a chat template may write is that of the run which is gone on with.
    now = (run_before(output).get("now") if output else None) or datetime.now().isoformat(timespec="seconds")
    file = None if output is None else ScoreFile(output, _run_of(data, weights, columns, scoring, place, now))
    if file is not None and file.finished:
        console.print(f"{output} is complete: nothing to do", highlight=False)
        return file.account
    loaded, tokenizer = open_model(weights, weights.dtype)
    requests = {k: getattr(scoring, k) for k in _OF_REQUESTS}
    builder = request_builder_for(loaded, tokenizer, bos=_BOS[scoring.bos], now=now, **requests)
    if builder.encoder.writes_time:
        say(f"the chat template writes the time: it is taken to be {now}", console)
    account = Account(reader.format, columns.quarantine)
    rows = Rows(reader, builder, (columns.x, columns.y, columns.plain), account)
    details = Details(scoring.tokens, scoring.words, scoring.segments, scoring.entropy, scoring.top_k)
    if scoring.corrected_words:
        details = details.with_corrected_words(tokenizer)
    settings: dict[str, Any] = {"marginal": scoring.marginal, "details": details, "tally": Tally()}
    scorer: AnswerStream = partial(scores, loaded, **settings)
    if ray:
        from ..scores.clusters import scores_on_ray

        # The workers load it themselves; here its memory is of no more use.
        del loaded
        scorer = partial(scores_on_ray, (*place, weights.dtype), workers=ray, **settings)
    found = run(rows, scorer, settings["tally"], file, console, silent)
    say(f"{settings['tally']}; {summary(found)}", console)
    return found


_OF_REQUESTS = (
    "border", "control", "overflow", "max_length", "unconditional", "stride", "window_bos",
)  # fmt: skip
_BOS: dict[str, Bos] = {"auto": "auto", "always": True, "never": False}


def _run_of(
    data: str,
    weights: Weights,
    columns: RowOptions,
    scoring: Scoring,
    place: tuple[str, str | None],
    now: str,
) -> dict[str, Any]:
    """What the scores depend on: a file of another run isn't gone on with."""
    facts = asdict(columns) | asdict(scoring) | {"data": data, "dtype": weights.dtype, "now": now}
    # Where rejected rows go changes no score.
    facts.pop("quarantine")
    return facts | _identity(place, data)


def summary(account: dict[str, Any]) -> str:
    """The account of a run's scores in one line."""
    if account["impossible"]:
        return f"log Pr(y|x) −∞ per token of y ({account['impossible']:,} y's of probability 0)"
    parts = [f"log Pr(y|x) {-(account['conditional_nats_per_token'] or 0):.4f} per token of y"]
    for name, label in (
        ("perplexity", "perplexity"),
        ("bits_per_byte", "bits/byte"),
        ("bits_per_word", "bits/word"),
    ):
        if account[name] is not None:
            parts.append(f"{label} {account[name]:.4g}")
    if "choices" in account:
        shares = ", ".join(f"{by} {share:.1%}" for by, share in account["choices"]["accuracy"].items())
        parts.append(f"accuracy over {plural(account['choices']['rows'], 'row')}: {shares}")
    return "; ".join(parts)


# What a model and its tokenizer are read from; a directory may hold other files, such as these scores.
MODEL_FILES = (
    "*.safetensors*", "config.json", "adapter_config.json", "tokenizer*", "vocab*", "merges.txt", "*.model",
    "added_tokens.json", "special_tokens_map.json", "chat_template*",
)  # fmt: skip


def _identity(model: tuple[str, str | None], data: str) -> dict[str, Any]:
    """What tells whether model, data and package are still the same; a model on the hub goes by its commit."""
    directory, gguf_file = Path(model[0]), model[1]
    patterns = MODEL_FILES if gguf_file is None else (*MODEL_FILES, gguf_file)
    rows = Path(data)
    # The datasets library writes cache-* into a saved set while it is read.
    of_data = (f for f in rows.rglob("*") if not f.name.startswith("cache-")) if rows.is_dir() else [rows]
    return {
        "model": model,
        "revision of the model": revision_of(*model),
        "files of the model": _listing(f for p in patterns for f in directory.glob(p)),
        "files of the data": _listing(of_data),
        "ygivenx": __version__,
    }


def _listing(files: Iterable[Path]) -> str:
    """A short hash of the names, sizes and times of the files; empty for none."""
    # By size and time, as make does: to hash a large model takes longer than to score some thousand rows.
    stats = {str(f): f.stat() for f in files if f.is_file()}
    facts = sorted((name, s.st_size, s.st_mtime_ns) for name, s in stats.items())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12] if facts else ""
