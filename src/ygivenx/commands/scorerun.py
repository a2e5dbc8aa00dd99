"""Rows of a file to scores: numbered, in input order, resumable; what can't be scored is counted by reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from .. import __version__
from ..errors import ConfigError, ModelError, RowError, nearest
from ..models.resolve import revision_of
from ..rows.formats import normalise
from ..scores.requests import Question, Questioner
from ..scores.scorefile import ScoreFile, run_before
from ..sequence import Rejected
from ..show import visible_json
from .inputs import open_model, say, say_account
from .progress import bar

# What scores questions: it may read ahead, and answers in order.
Teller = Callable[[Iterator[Question]], Iterator[Any]]


class Numbered(NamedTuple):
    """A question, the row that it comes from (from 0) and which of that row's it is (from 0)."""

    row: int
    sequence: int
    question: Question


@dataclass
class Rows:
    """The questions of a reader's rows. Each row is accepted or quarantined; the counts add up to `read`.

    columns: the names of x and y, and whether they are plain text, as the reader was opened with; a row
    whose y is a list of texts asks a question for each.
    """

    reader: Any
    questioner: Questioner
    columns: tuple[str | None, str | None, bool] = (None, None, False)
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[Rejected] = field(default_factory=list)

    def __iter__(self) -> Iterator[Numbered]:
        self.accepted, self.reasons, self.first = 0, Counter(), []
        for number, item in enumerate(self.reader):
            try:
                questions = [q for value in self._values(item) for q in self.questioner(value)]
            except RowError as error:
                error.where = error.where or item.where
                self._quarantine(Rejected(None, error.reason, error.where, str(error)))
                continue
            if questions:
                self.accepted += 1
            for k, question in enumerate(questions):
                yield Numbered(number, k, question)

    def _values(self, item: Any) -> list[Any]:
        """What a row asks; nothing if it is quarantined."""
        if not isinstance(item, Rejected):
            return [item.value]
        x, y, plain = self.columns
        column = y or next((c for c in ("y", "completion", "answer") if c in (item.row or ())), "")
        several = item.row.get(column) if isinstance(item.row, dict) else None
        if not isinstance(several, list) or not all(isinstance(v, str) for v in several) or not several:
            self._quarantine(item)
            return []
        named = {"columns": (x, y), "as_text": plain} if x and y else {}
        return [normalise(item.row | {column: v}, **named) for v in several]  # type: ignore[arg-type]

    def _quarantine(self, item: Rejected) -> None:
        self.reasons[item.reason] += 1
        self.first = self.first or [item]

    def account(self) -> dict[str, Any]:
        """Plain types: the counts so far; accepted + quarantined = read."""
        return {
            "format": self.reader.format,
            "read": self.accepted + self.reasons.total(),
            "accepted": self.accepted,
            "quarantined": self.reasons.total(),
            "reasons": dict(self.reasons.most_common()),
        }


def records(numbered: Iterable[Numbered], told: Teller) -> Iterator[dict[str, Any]]:
    """One record per question, in order; `told` makes Scores of questions, reading ahead as it likes."""
    waiting: deque[tuple[int, int]] = deque()

    def questions() -> Iterator[Question]:
        for n in numbered:
            waiting.append((n.row, n.sequence))
            yield n.question

    try:
        for score in told(questions()):
            row, sequence = waiting.popleft()
            yield {"row": row, "sequence": sequence, **score.to_dict()}
    except ModelError as error:
        if waiting:
            error.where = f"rows {waiting[0][0]} to {waiting[-1][0]}, {error.where}".removesuffix(", ")
        raise


@dataclass
class Means:
    """Sums over records, as they pass. impossible: y's of probability 0, whose log p JSON has no number for."""

    scored: int = 0
    tokens_y: int = 0
    log_p_y: float = 0.0
    greedy: int = 0
    impossible: int = 0

    def over(self, stream: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same records, added up."""
        for r in stream:
            self.scored += 1
            self.tokens_y += r["scored"]
            self.log_p_y += r["log_p_y_given_x"] or 0.0
            self.greedy += r["greedy"]
            self.impossible += r["log_p_y_given_x"] is None
            yield r

    def to_dict(self) -> dict[str, Any]:
        finite = self.tokens_y and not self.impossible
        return {
            "scored": self.scored,
            "tokens_y": self.tokens_y,
            "conditional_nats_per_token": -self.log_p_y / self.tokens_y if finite else None,
            "greedy": self.greedy,
            "impossible": self.impossible,
        }


def run(
    rows: Rows, told: Teller, tally: Any, file: ScoreFile | None, console: Console, silent: bool = False
) -> dict[str, Any]:
    """Score all rows, into a file or on standard output as JSON Lines unless `silent`; the account of the run.

    What the file holds already isn't scored again. Progress goes to the console.
    """
    means = Means()
    if file is not None:
        deque(means.over(file.records()), maxlen=0)
    fresh = records(islice(iter(rows), means.scored, None), told)
    with bar(console) as progress:
        shown = means.over(_shown(fresh, progress, sum(1 for _ in rows.reader), tally))
        if file is not None:
            file.write(shown)
        else:
            for record in shown:
                if not silent:
                    print(visible_json(json.dumps(record, ensure_ascii=False, allow_nan=False)), flush=True)
    account = rows.account() | means.to_dict() | {"run": tally.to_dict()}
    if file is not None:
        file.finish(account)
    return account


def _shown(
    stream: Iterator[dict[str, Any]], progress: Progress, total: int, tally: Any
) -> Iterator[dict[str, Any]]:
    task = progress.add_task("scoring", total=total)
    for record in stream:
        progress.update(task, completed=record["row"] + 1, description=f"scoring: {tally}")
        yield record


def score_file(
    reader: Any, model: tuple[str, str | None], output: Path | None, flags: dict[str, Any], *, console: Console,
    silent: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`ygx score` with its flags: a reader's rows by the model at (directory, GGUF file); the account, also aloud.

    `silent` keeps the records off standard output where there is no file for them.
    """
    from ..scores.scoring import Tally, questioner_for, scores

    # What a chat template may write is that of the run which is gone on with.
    now = (run_before(output).get("now") if output else None) or datetime.now().isoformat(timespec="seconds")
    run_of = {k: v for k, v in flags.items() if k != "ray"} | {"now": now} | _identity(model, reader.name)
    file = None if output is None else ScoreFile(output, run_of)
    if file is not None and file.finished:
        console.print(f"{output} is complete: nothing to do", highlight=False)
        return file.account
    loaded, tokenizer = open_model(*model, flags["dtype"])
    asked = {k: flags[k] for k in ("border", "control", "overflow", "max_length", "unconditional")}
    asked |= {"bos": _bos(flags["bos"]), "now": now}
    told = {"marginal": flags["marginal"], "tokens": flags["tokens"], "tally": Tally()}
    questioner = questioner_for(loaded, tokenizer, **asked)
    if questioner.encoder.dated:
        say(f"the chat template writes the time: it is taken to be {now}", console)
    rows = Rows(reader, questioner, (flags["x"], flags["y"], flags["plain"]))
    teller: Teller = partial(scores, loaded, **told)
    if flags["ray"]:
        from ..scores.clusters import scores_on_ray

        del loaded
        teller = partial(scores_on_ray, (*model, flags["dtype"]), workers=flags["ray"], **told)
    account = run(rows, teller, told["tally"], file, console, silent)
    say_account(account, rows.first[0].message if rows.first else "")
    console.print(f"{told['tally']}; {_mean(account)} nats per token of y", highlight=False)
    return account


def _mean(account: dict[str, Any]) -> str:
    if account["impossible"]:
        return f"{account['impossible']:,} y's of probability 0, so ∞"
    return f"{account['conditional_nats_per_token'] or 0:.4f}"


def _bos(flag: str) -> bool | str:
    known: dict[str, bool | str] = {"auto": "auto", "always": True, "never": False}
    if flag not in known:
        raise ConfigError(f"unknown bos {flag!r}{nearest(flag, known)}", fix="auto, always or never")
    return known[flag]


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
    stats = {str(f): f.stat() for f in files if f.is_file()}
    told = sorted((name, s.st_size, s.st_mtime_ns) for name, s in stats.items())
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12] if told else ""
