"""Rows to examples: ids, a weight for each token, and segments that say what each token is.

`Encoder` renders a conversation, proves which of its tokens the model has to produce (contract.py), encodes
them in batches and weighs them by policy. What can't be proven is refused with a reason; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .contract import Contract, Draft, Row
from .data import Row as DataRow
from .errors import ConfigError, RowError, nearest
from .formats import Conversation, Pair, normalise
from .layout import Span, spans_of
from .places import located, quiet_loading
from .policy import Part, Policy, policy_of, weight_of
from .sequence import Example, Rejected, Segment, Sequence
from .template import Inputs, Template, inputs_of
from .tokens import Encoded, Pieces, Tokens

BORDERS = ("refuse", "mask", "split", "y")
CONTROLS = ("refuse", "text", "parse")


class Encoder:
    """Encodes rows for one tokenizer; see the class methods' arguments.

    train: policies (policy.py). control: what a special token written in a row's text is: `refuse` the row,
    ordinary `text`, or `parse` it. border: what to do where a token holds the end of x and the beginning of y:
    `refuse`, `mask` it (x), `y` (it counts as y), or `split` (encode x and y apart).
    bos, eos: of plain pairs: True, False, or "auto": a BOS where the tokenizer itself adds one; an eos after
    y where the tokenizer has one and y doesn't end in it.
    stops: further tokens that end a turn, beside the tokenizer's eos.
    """

    def __init__(
        self,
        tokenizer: Any,
        train: str | Policy | Iterable[str | Policy] = "assistant",
        *,
        control: str = "refuse",
        border: str = "refuse",
        max_length: int | None = None,
        overflow: str = "refuse",
        bos: bool | str = "auto",
        eos: bool | str = "auto",
        stops: Iterable[str] = (),
    ) -> None:
        _one_of("control", control, CONTROLS)
        _one_of("border", border, BORDERS)
        self.tokenizer, self.control, self.border = tokenizer, control, border
        self.bos, self.eos = bos, eos
        self.policy = policy_of(train)
        self.tokens = Tokens(tokenizer, stops)
        self.contract = Contract(self.tokens)
        self._templates: dict[str, Template] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path, gguf_file: str | None = None, **options: Any) -> Encoder:
        """The encoder of a model's directory: its tokenizer, and the stop tokens of its generation config."""
        from transformers import AutoTokenizer

        path, gguf_file = located(path, gguf_file)
        with quiet_loading(path):
            tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
        config = Path(path) / "generation_config.json"
        if "stops" not in options and config.is_file():
            ids = json.loads(config.read_text()).get("eos_token_id") or []
            options["stops"] = tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])
        return cls(tokenizer, **options)

    def __call__(self, row: Any) -> Example:
        """One row (a mapping, Conversation, Pair or data.Row) as an Example; raises RowError."""
        examples, rejected = self._batch([row])
        if rejected:
            raise rejected[0][1]
        return examples[0]

    def batch(self, rows: Iterable[Any]) -> tuple[list[Example], list[Rejected]]:
        """Examples and rejected rows, each in order; together as many as there were rows."""
        examples, errors = self._batch(list(rows))
        return examples, [Rejected(_raw(row), e.reason, _place(e), str(e)) for row, e in errors]

    def _batch(self, rows: list[Any]) -> tuple[list[Example], list[tuple[Any, RowError]]]:
        jobs: list[_Job] = []
        errors: dict[int, RowError] = {}
        for n, row in enumerate(rows):
            try:
                jobs.append(self._job(n, row))
            except RowError as e:
                errors[n] = _located(e, n, row)
        texts = [t for job in jobs for t in job.texts]
        encoded = iter(self.tokens.encode(texts))
        examples = []
        for job in jobs:
            parts = [next(encoded) for _ in job.texts]
            try:
                examples.append(Example(tuple(job.finish(parts)), _raw(rows[job.number])))
            except RowError as e:
                errors[job.number] = _located(e, job.number, rows[job.number])
        return examples, [(rows[n], errors[n]) for n in sorted(errors)]

    def _job(self, number: int, row: Any) -> _Job:
        value = row.value if isinstance(row, DataRow) else row
        if not isinstance(value, Conversation | Pair):
            value = normalise(value)
        if isinstance(value, Pair):
            return self._pair(number, value)
        return self._conversation(number, value)

    # --- conversations -----------------------------------------------------------------------------------

    def _conversation(self, number: int, row: Conversation) -> _Job:
        inputs = inputs_of(row.messages, row.tools, row.documents, row.template_kwargs)
        rendered = Row(self._template(inputs), inputs)
        wanted = [i for i in rendered.replies() if self._wanted(row, i, rendered.replies()[-1])]
        drafts = self.contract.drafts(rendered, wanted)
        if self.control == "refuse":
            self._refuse_control(inputs)

        def finish(parts: list[Encoded]) -> list[Sequence]:
            return [self._sequence(row, d, e) for d, e in zip(drafts, parts, strict=True)]

        return _Job(number, [d.text for d in drafts], finish)

    def _template(self, inputs: Inputs) -> Template:
        if not self.tokenizer.chat_template:
            raise RowError(
                "the tokenizer has no chat template, and this row is a conversation",
                reason="no_template",
                fix="set tokenizer.chat_template, or give the row as text: columns prompt and completion, or x and y",
            )
        source = self.tokenizer.get_chat_template(tools=inputs.tools)
        if source not in self._templates:
            self._templates[source] = Template(source, self.tokenizer.special_tokens_map)
        return self._templates[source]

    def _wanted(self, row: Conversation, i: int, last: int) -> bool:
        weight = row.messages[i].get("weight", 1.0)
        kinds = ("answer", "reasoning", "tool_call", "end_of_turn")
        parts = (Part(k, True, i, "assistant", i == last, weight) for k in kinds)
        return any(weight_of(self.policy, p) > 0 for p in parts)

    def _refuse_control(self, inputs: Inputs) -> None:
        for path, text in _leaves(
            {"messages": inputs.messages, "tools": inputs.tools, "documents": inputs.documents}
        ):
            if found := self.tokens.has_control(text):
                raise _control_text(found[0], path, found.start())

    def _sequence(self, row: Conversation, draft: Draft, encoded: Encoded) -> Sequence:
        borders = {}
        for turn in draft.turns:
            for at in (turn.start, turn.stop):
                borders[at] = self.tokens.border(encoded, at)
                if borders[at] is None:
                    raise _straddle(encoded, at, f"messages[{turn.message}]")
        spans = spans_of(draft, encoded, borders, row.messages)
        return self._weighed(
            encoded, spans, row, draft.notes + tuple(n for t in draft.turns for n in t.notes)
        )

    def _weighed(
        self, encoded: Encoded, spans: list[Span], row: Conversation, notes: tuple[str, ...]
    ) -> Sequence:
        weights = np.zeros(len(encoded.ids), np.float32)
        replies = [i for i, m in enumerate(row.messages) if m.get("role") == "assistant"]
        for s in spans:
            message = row.messages[s.message] if s.message is not None else {}
            is_last = bool(replies) and s.message == replies[-1]
            own = message.get("weight", 1.0)
            part = Part(s.kind, s.output, s.message, message.get("role"), is_last, own)
            weights[s.start : s.stop] = weight_of(self.policy, part)
        return _made(encoded.ids, weights, spans, Pieces(encoded.text, encoded.starts, encoded.stops), notes)

    # --- plain pairs -------------------------------------------------------------------------------------

    def _pair(self, number: int, row: Pair) -> _Job:
        x, y, notes = row.x, row.y, []
        eos = self.tokenizer.eos_token
        if not x and not y:
            raise RowError("x and y are both empty", reason="empty_pair")
        ends = bool(eos) and y.endswith(eos)
        add_eos = self.eos is True or (self.eos == "auto" and bool(eos) and not ends)
        if add_eos and not eos:
            raise ConfigError("eos=True, but the tokenizer has no eos token", fix="set tokenizer.eos_token")
        bos = self.tokenizer.bos_token
        begins = bool(bos) and x.startswith(bos)
        add_bos = self.bos is True or (self.bos == "auto" and self.tokens.adds_bos and not begins)
        if add_bos and not bos:
            raise ConfigError("bos=True, but the tokenizer has no bos token", fix="set tokenizer.bos_token")
        if add_eos:
            notes.append(f"{eos} was appended to y")
        if self.control == "refuse":
            own = (len(bos) if begins else 0, len(y) - (len(eos) if ends else 0))
            self._refuse_pair_control(x, y, *own)
        apart = self.border == "split"

        def finish(parts: list[Encoded]) -> list[Sequence]:
            return [self._pair_sequence(row, parts, add_bos, add_eos, ends, tuple(notes))]

        return _Job(number, [x, y] if apart else [x + y], finish)

    def _refuse_pair_control(self, x: str, y: str, x_from: int, y_to: int) -> None:
        for name, text, start, stop in (("x", x, x_from, len(x)), ("y", y, 0, y_to)):
            if found := self.tokens.control(text, start, stop):
                raise _control_text(found[0][0], name, found[0].start())

    def _pair_sequence(
        self,
        row: Pair,
        parts: list[Encoded],
        add_bos: bool,
        add_eos: bool,
        ends: bool,
        notes: tuple[str, ...],
    ) -> Sequence:
        encoded, border, moved = self._pair_border(row, parts)
        head = [self.tokenizer.bos_token_id] if add_bos else []
        tail = [self.tokenizer.eos_token_id] if add_eos else []
        ids = np.concatenate([head, encoded.ids, tail]).astype(np.int64)
        n, m = len(head), len(head) + len(encoded.ids)
        stop = m - 1 if ends and m > n + border else m
        spans = [
            Segment(0, n, "bos"),
            Segment(n, n + border, "prompt"),
            Segment(n + border, stop, "answer", output=True),
            Segment(stop, len(ids), "end_of_turn", output=True),
        ]
        weights = np.zeros(len(ids), np.float32)
        for s in spans:
            weights[s.start : s.stop] = weight_of(self.policy, Part(s.kind, s.output, None, None, s.output))
        texts = list(Pieces(encoded.text, encoded.starts, encoded.stops))
        texts = [self.tokenizer.bos_token] * add_bos + texts + [self.tokenizer.eos_token] * add_eos
        return _made(ids, weights, spans, tuple(texts), notes + moved)

    def _pair_border(self, row: Pair, parts: list[Encoded]) -> tuple[Encoded, int, tuple[str, ...]]:
        """The encoded pair, how many of its tokens are x, and what was done where one token holds both."""
        if self.border == "split":
            x, y = parts
            return _joined(x, y), len(x.ids), ("x and y are encoded apart",)
        (encoded,) = parts
        border = self.tokens.border(encoded, len(row.x))
        if border is not None:
            return encoded, border, ()
        if self.border == "refuse" or not encoded.tiled:
            raise _straddle(encoded, len(row.x), "y")
        first = int(np.searchsorted(encoded.starts, len(row.x))) - 1
        token = encoded.text[encoded.starts[first] : encoded.stops[first]]
        side = "masked, as part of x" if self.border == "mask" else "counted as y"
        return (
            encoded,
            first + (self.border == "mask"),
            (f"the token {token!r} holds the end of x and the beginning of y: {side}",),
        )


class _Job:
    """A row on its way: the texts to encode, and what to make of them."""

    def __init__(
        self, number: int, texts: list[str], finish: Callable[[list[Encoded]], list[Sequence]]
    ) -> None:
        self.number, self.texts, self.finish = number, texts, finish


def _made(
    ids: np.ndarray, weights: np.ndarray, spans: Iterable[Any], tokens: Any, notes: tuple[str, ...]
) -> Sequence:
    weights[:1] = 0  # nothing stands before the first token
    if not weights.any():
        raise RowError(
            "no token of this row is trained",
            reason="nothing_trained",
            fix="check train=, the messages' weights, and that the row has a reply",
        )
    segments = tuple(Segment(s.start, s.stop, s.kind, s.output, s.message) for s in spans if s.stop > s.start)
    return Sequence(ids, weights, segments, tokens, notes)


def _joined(x: Encoded, y: Encoded) -> Encoded:
    shift = len(x.text)
    return Encoded(
        x.text + y.text,
        np.concatenate([x.ids, y.ids]),
        np.concatenate([x.starts, y.starts + shift]),
        np.concatenate([x.stops, y.stops + shift]),
        x.tiled and y.tiled,
    )


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Each string of a row with its path; the names of its fields, which are text too, among them."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, str(key)
            yield from _leaves(item, here)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")


def _control_text(token: str, path: str, at: int) -> RowError:
    return RowError(
        f"{token!r} at character {at} is a control token of the tokenizer",
        reason="control_text",
        field=path,
        why="parsed, it would forge the structure of the conversation",
        fix="control='text' encodes it as ordinary text, control='parse' as the token; or mend the row",
    )


def _straddle(encoded: Encoded, at: int, field: str) -> RowError:
    if encoded.tiled:
        k = int(np.searchsorted(encoded.starts, at)) - 1
        token = repr(encoded.text[encoded.starts[k] : encoded.stops[k]])
        what = f"the token {token} holds the end of x and the beginning of y"
    else:
        what = "the ids of x aren't a prefix of the ids of x and y together"
    return RowError(
        what,
        reason="straddling_token",
        field=field,
        why="inference shows x encoded alone: the model would be trained on ids that it never sees",
        fix="border='mask' leaves such a token out of y, border='split' encodes x and y apart, "
        "border='refuse' (the default) keeps such rows out",
    )


def _located(e: RowError, number: int, row: Any) -> RowError:
    place = row.where if isinstance(row, DataRow) else f"row {number}"
    e.where = ", ".join(w for w in (place, e.field) if w)
    return e


def _place(e: RowError) -> str:
    return e.where


def _raw(row: Any) -> Any:
    return row.raw if isinstance(row, DataRow) else row


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r}{nearest(str(value), known)}", fix=f"known: {', '.join(known)}")
