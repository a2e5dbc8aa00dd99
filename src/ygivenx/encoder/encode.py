"""Rows to examples: ids, a weight for each token, and segments that say what each token is.

Equals `ygivenx.reference.encode`, to the bit, where that can encode a row: it knows no repairs and fewer ends of turns.

`Encoder` renders a conversation, proves which of its tokens the model has to produce (prove.py), encodes
them in batches and weighs them by policy. What can't be proven is refused with a reason; nothing is guessed.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..choices import Border, Bos, Context, Control, Dropped, Overflow, Thoughts, require_choice
from ..errors import ConfigError, RowError
from ..models.resolve import file_of, located, quiet_loading
from ..rows.columns import rated_row
from ..rows.data import Row
from ..rows.formats import Conversation, Pair, Preference, Rated, TokenRow, normalise
from ..rows.nouns import Message
from ..sequence import Example, Rejected, Sequence
from ..templating.inputs import inputs_of
from .chats import Chats, ChatWork
from .content import headers_of
from .policy import Options, Policy, policy_of
from .repairs import chosen
from .texts import Pairs, RenderedChats, token_job
from .tokenize import Encoded, Tokens
from .ways_out import WaysOut
from .weigh import Work

CHOICES = {
    "control": Control, "border": Border, "context": Context, "dropped": Dropped, "overflow": Overflow,
    "thoughts": Thoughts,
}  # fmt: skip


_GROUP = (
    64  # rows on their way at once: of more, Python's garbage collector goes over too many half-made ones
)


class Encoder:
    """Encodes rows for one tokenizer.

    train: policies (policy.py) by name or as functions, multiplied.
    control: a special token written in a row's text: `refuse` the row, ordinary `text`, or `parse` it.
    border: a token that holds the end of x and the beginning of y: `refuse` the row, `mask` the token (x), `split`
    (x and y encoded apart, as inference would go on) or, for plain pairs alone, `y` (it counts as y). `auto`: `split`
    for conversations, with a note; `refuse` for plain pairs, where x is cut as whoever made the row would have it.
    context: train each reply after what `inference` shows, or in the one text as `rendered` (with a note).
    repair: names of repairs.py, "default", "all" or "none". dropped: `refuse` a row of which the template leaves
    out a part that would be trained, or `warn` in the notes.
    max_length, overflow: `refuse` what is longer, `drop_turns` (whole oldest turns, rendered anew), `drop_reply` (the
    replies that fit are trained, the one that is cut is context) or `truncate`; notes say what that cost.
    thoughts: of replies without one, where a prompt opens a thought: `as_written` (what inference with the row's own
    switch shows; switched off where nothing else is exact), `off` (thinking is switched off for them), `empty` (an
    empty thought is trained) or `empty_masked` (it is context).
    bos, eos: of plain pairs: True, False, or "auto": a BOS where the tokenizer itself adds one; an eos after
    y where the tokenizer has one and y doesn't end in it.
    stops: further tokens that end a turn, beside the tokenizer's eos. template_kwargs: for every row.
    now: the time that a template may write (ISO 8601 or a datetime), one for all rows; by default that of making
    this encoder. Raises ConfigError for an unknown choice.
    """

    def __init__(
        self,
        tokenizer: Any,
        train: str | Policy | Iterable[str | Policy] = "assistant",
        *,
        control: Control = "refuse",
        border: Border = "auto",
        context: Context = "inference",
        repair: str | Iterable[str] = "default",
        dropped: Dropped = "refuse",
        max_length: int | None = None,
        overflow: Overflow = "refuse",
        thoughts: Thoughts = "as_written",
        bos: Bos = "auto",
        eos: Bos = "auto",
        stops: str | Iterable[str] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        now: datetime | str | None = None,
    ) -> None:
        choice: dict[str, Any] = {
            "control": control, "border": border, "context": context, "dropped": dropped, "overflow": overflow,
            "thoughts": thoughts,
        }  # fmt: skip
        for name, value in choice.items():
            require_choice(name, value, CHOICES[name])
        _check_kinds(repair, bos, eos, stops, max_length, template_kwargs)
        self.tokenizer, self.now = tokenizer, _time(now)
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        self.tokens = Tokens(tokenizer, stops, headers_of(tokenizer))
        further = {"repair": repair, "max_length": max_length, "bos": bos, "eos": eos, "stops": stops}
        self._made_of = (train, {**choice, **further, "template_kwargs": template_kwargs, "now": self.now})
        options = Options(
            self.tokens, policy_of(train), **choice, repairs=chosen(repair), max_length=max_length, bos=bos, eos=eos,
            template_kwargs=dict(template_kwargs or {}), now=self.now,
        )  # fmt: skip
        self._options, self._chats, self._pairs = options, Chats(options), Pairs(options)
        self._ways_out = WaysOut(options)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        gguf_file: str | None = None,
        *,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Encoder:
        """The encoder of a model's directory or name: its tokenizer, and the stop tokens of its generation config.

        trust_remote_code: run code that comes with the tokenizer; without it that is refused, and nobody is asked.
        """
        from transformers import AutoTokenizer

        path, gguf_file = located(path, gguf_file)
        with quiet_loading(path):
            tokenizer = AutoTokenizer.from_pretrained(
                path, gguf_file=gguf_file, trust_remote_code=trust_remote_code
            )
            if "stops" not in options:
                options["stops"] = _stops(path, tokenizer)
        return cls(tokenizer, **options)

    @property
    def writes_time(self) -> bool:
        """Whether a chat template asks for the time, so that `now` is in the tokens."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    @property
    def options(self) -> dict[str, Any]:
        """What the encoder was made with, by name."""
        return dict(self._made_of[1])

    def variant(self, **options: Any) -> Encoder:
        """The same encoder with other options."""
        train, own = self._made_of
        return Encoder(self.tokenizer, train, **{**own, **options})

    def __call__(self, row: Any) -> Example:
        """One row (a mapping, Conversation, Pair or data.Row) as an Example; raises RowError."""
        done = self._encode([row])[0]
        if isinstance(done, RowError):
            raise done
        return done if isinstance(row, Row) else replace(done, index=None)

    def __reduce__(self) -> Any:  # compiled templates don't travel to other processes
        train, options = self._made_of
        return _remade, (self.tokenizer, train, options)

    def batch(self, rows: Iterable[Any], *, processes: int = 1) -> tuple[list[Example], list[Rejected]]:
        """Examples and rejected rows, each in order; together as many as there were rows.

        With several processes each gets a copy of this encoder, so that policies must be importable functions;
        raises ConfigError where one isn't.
        """
        rows = list(rows)
        done = self.each(rows, processes)
        examples = [d for d in done if isinstance(d, Example)]
        refused = [(r, d) for r, d in zip(rows, done, strict=True) if isinstance(d, RowError)]
        return examples, [Rejected(_raw(r), e.reason, e.where, str(e)) for r, e in refused]

    def each(self, rows: list[Any], processes: int = 1) -> list[Example | RowError]:
        """For each row its Example, or the error by which it is rejected; see `batch`."""
        if not _is_count(processes):
            raise ConfigError(f"processes={processes!r}", fix="give a number of processes, at least 1")
        return self._encode(rows) if processes == 1 else self._encode_apart(rows, processes)

    def _encode_apart(self, rows: list[Any], processes: int) -> list[Example | RowError]:
        try:
            encoder = pickle.dumps(self)
        except (pickle.PicklingError, AttributeError, TypeError) as e:
            raise ConfigError(
                "this encoder can't be handed to other processes",
                why=str(e),
                fix="make the policy a function of a module that can be imported, or leave processes at 1",
            ) from e
        size = max(1, -(-len(rows) // (4 * processes)))
        chunks = [(first, rows[first : first + size]) for first in range(0, len(rows), size)]
        spawn = get_context("spawn")  # a fork of a process with threads may hang
        with ProcessPoolExecutor(processes, spawn, _adopt, (encoder,)) as pool:
            return [done for chunk in pool.map(_encode_chunk, chunks) for done in chunk]

    def _encode(self, rows: list[Any], first: int = 0) -> list[Example | RowError]:
        groups = range(0, len(rows), _GROUP)
        return [done for at in groups for done in self._encode_group(rows[at : at + _GROUP], first + at)]

    def _encode_group(self, rows: list[Any], first: int) -> list[Example | RowError]:
        jobs = [self._try(n, row) for n, row in enumerate(rows, first)]
        texts = [t for job in jobs if not isinstance(job, RowError) for t in job.texts]
        encoded = iter(self.tokens.encode_cut(texts))
        done: list[Example | RowError] = []
        for n, (row, job) in enumerate(zip(rows, jobs, strict=True), first):
            if isinstance(job, RowError):
                done.append(job)
                continue
            parts = [next(encoded) for _ in job.texts]
            try:
                index = row.index if isinstance(row, Row) else n
                done.append(Example(tuple(self._finished(job, parts)), _raw(row), index=index))
            except RowError as e:
                value = job.chat.row if isinstance(job, ChatWork) else None
                done.append(_located(self._ways_out.named(value, e), n, row))
        return done

    def _finished(self, work: Work, parts: list[Encoded]) -> list[Sequence]:
        """The sequences of a row, without its oldest turns where it is too long and the options say so."""
        try:
            return work.finish(parts)
        except RowError as e:
            drops = e.reason == "too_long" and self._options.overflow == "drop_turns"
            if not drops or not isinstance(work, ChatWork):
                raise
            return self._chats.shorter(work.chat.row, e)

    def _try(self, number: int, row: Any) -> Work | RowError:
        value = row.value if isinstance(row, Row) else row
        try:
            value = noun_of(value)
            if isinstance(value, Preference | Rated):
                raise _rated(value)
            if isinstance(value, TokenRow):
                return token_job(value, self._options)
            return self._pair_job(value) if isinstance(value, Pair) else self._chats.job(value)
        except RowError as e:
            return _located(self._ways_out.named(value, e), number, row)

    def _pair_job(self, row: Pair) -> Work:
        """A pair as it stands; a text that is a rendered chat, as the conversation that it was."""
        try:
            return self._pairs.job(row)
        except RowError as e:
            if e.reason != "control_text" or not self.tokenizer.chat_template:
                raise
            conversation, note = self._rendered(row, e)
            return self._chats.job(conversation, (note,))

    @cached_property
    def _rendered(self) -> RenderedChats:
        options = self._options

        def render(messages: list[Message]) -> str:
            inputs = inputs_of(messages, None, None, options.template_kwargs, options.now)
            return self._chats.template(inputs).render(inputs)

        return RenderedChats(render, self.tokenizer.bos_token or "")


# What the commands take by name, beside `train` and `control`.
OPTIONS = tuple(
    name
    for name, p in signature(Encoder.__init__).parameters.items()
    if p.kind is p.KEYWORD_ONLY and name != "control"
)


def _check_kinds(repair: Any, bos: Any, eos: Any, stops: Any, max_length: Any, template_kwargs: Any) -> None:
    """Raise ConfigError for a value of another kind than its option has: they come from command lines, too."""
    is_mapping = isinstance(template_kwargs, Mapping | None)
    for name, value, fits, expected in (
        ("repair", repair, isinstance(repair, Iterable), "names, separated by commas"),
        ("bos", bos, isinstance(bos, bool) or bos == "auto", "True, False or 'auto'"),
        ("eos", eos, isinstance(eos, bool) or eos == "auto", "True, False or 'auto'"),
        ("stops", stops, isinstance(stops, Iterable), "texts of tokens"),
        ("max_length", max_length, max_length is None or _is_count(max_length), "a number of tokens, at least 1"),
        ("template_kwargs", template_kwargs, is_mapping, "values by name"),
    ):  # fmt: skip
        if not fits:
            raise ConfigError(f"{name}={value!r}", fix=f"give {expected}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _stops(path: str, tokenizer: Any) -> list[str]:
    """The tokens that end generation by a model's generation config, from its directory, the hub or its cache."""
    file = file_of(path, "generation_config.json")
    ids = json.loads(file.read_text()).get("eos_token_id") if file else None
    known = tokenizer.added_tokens_decoder
    return [str(known[i]) for i in (ids if isinstance(ids, list) else [ids]) if i in known]


def _time(value: Any) -> datetime:
    """A datetime, or ISO 8601 as command lines and YAML have it; None is the present."""
    if value is None or isinstance(value, datetime):
        return value or datetime.now()
    try:
        return datetime.fromisoformat(str(value))
    except ValueError as error:
        fix = "give a date such as 2026-01-31, or 2026-01-31T12:00"
        raise ConfigError(f"now={value!r}", why=str(error), fix=fix) from error


def _remade(tokenizer: Any, train: Any, options: dict[str, Any]) -> Encoder:
    return Encoder(tokenizer, train, **options)


_adopted: list[Encoder] = []  # in a worker: the encoder that it was started with


def _adopt(encoder: bytes) -> None:
    _adopted[:] = [pickle.loads(encoder)]


def _encode_chunk(chunk: tuple[int, list[Any]]) -> list[Example | RowError]:
    first, rows = chunk
    return _adopted[0]._encode(rows, first)


def noun_of(value: Any) -> Conversation | Pair | Preference | Rated | TokenRow:
    """What a row means; raises RowError."""
    return (
        value if isinstance(value, Conversation | Pair | Preference | Rated | TokenRow) else normalise(value)
    )


def _rated(value: Preference | Rated) -> RowError:
    if isinstance(value, Preference):
        return rated_row("preference_row", "a preference row: a better and a worse reply to one prompt")
    if len(value.replies) > 1:
        return rated_row("preference_row", f"{len(value.replies)} rated replies to one prompt")
    return rated_row("judged_row", "a label says whether the reply is good")


def _located(e: RowError, number: int, row: Any) -> RowError:
    place = row.where if isinstance(row, Row) else f"row {number}"
    e.where = ", ".join(w for w in (place, e.field) if w)
    return e


def _raw(row: Any) -> Any:
    return row.raw if isinstance(row, Row) else row
