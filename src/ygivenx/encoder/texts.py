"""Rows that aren't conversations: plain pairs of texts, token ids, and texts that are rendered chats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, RowError
from ..rows.nouns import Conversation, Message, Pair, TokenRow
from ..sequence import Segment, Sequence
from .content import refuse_alike, refused
from .policy import Options, Part, weight_of
from .tokenize import Encoded, Pieces, TokenTexts, across, joined, straddle
from .weigh import Job, fitted, sequence_of


@dataclass(frozen=True)
class _Ends:
    """What is put before x and after y, and whether x already begins with the bos and y ends in the eos."""

    bos: tuple[str, ...]
    eos: tuple[str, ...]
    has_bos: bool
    has_eos: bool


class Pairs:
    """Pairs to jobs."""

    def __init__(self, options: Options) -> None:
        self.options, self.tokens = options, options.tokens

    def job(self, row: Pair) -> Job:
        if not row.x and not row.y:
            raise RowError("x and y are both empty", reason="empty_pair")
        bos = self.tokens.tokenizer.bos_token
        if bos and not row.x and row.y.startswith(bos):  # no model says it: it is x
            row = Pair(bos, row.y[len(bos) :], row.weight)
        ends = self._ends(row)
        cuts = self._controlled(row, ends)
        if self.options.border == "split" and row.x and row.y:
            self.tokens.need_plain_joints("border='split'")
        if self.options.border == "split" or not row.y or not row.x:
            texts = [(row.x, cuts[0]), (row.y, cuts[1])]
        else:
            texts = [(row.x + row.y, (*cuts[0], *(len(row.x) + c for c in cuts[1])))]
        o = self.options
        return Job(texts, lambda p: fitted([self._sequence(row, p, cuts[0], ends)], o.max_length, o.overflow))

    def _ends(self, row: Pair) -> _Ends:
        tokenizer, o = self.tokens.tokenizer, self.options
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        for name, choice, token in (("bos", o.bos, bos), ("eos", o.eos, eos)):
            if choice is True and not token:
                raise ConfigError(
                    f"{name}=True, but the tokenizer has no {name} token", fix=f"set tokenizer.{name}_token"
                )
        has_bos, has_eos = bool(bos) and row.x.startswith(bos), bool(eos) and row.y.endswith(eos)
        add_bos = o.bos is True or (o.bos == "auto" and self.tokens.adds_bos)
        add_eos = o.eos is True or (o.eos == "auto" and bool(eos))
        return _Ends((bos,) * (add_bos and not has_bos), (eos,) * (add_eos and not has_eos), has_bos, has_eos)

    def _controlled(self, row: Pair, ends: _Ends) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where x and y are cut so that their control tokens are text; a BOS and an eos at the ends are meant."""
        if self.options.control == "parse":
            return (), ()
        tokenizer = self.tokens.tokenizer
        first = (
            len(tokenizer.bos_token) if tokenizer.bos_token and row.x.startswith(tokenizer.bos_token) else 0
        )
        last = len(row.y) - (len(tokenizer.eos_token) if ends.has_eos else 0)
        whole = row.x + row.y
        across = [m[0] for m in self.tokens.control(whole) if m.start() < len(row.x) < m.end()]
        if across and self.options.border != "split":
            why = "x and y together write it; border='split' encodes them apart"
            raise refused("control_text", "y", across[0], why)
        if self.options.control == "refuse":
            for name, text, start, stop in (("x", row.x, first, len(row.x)), ("y", row.y, 0, last)):
                if found := self.tokens.control(text, start, stop):
                    raise refused("control_text", name, found[0][0])
        x = self.tokens.cuts(row.x, lambda m: m.start() >= first)
        return x, self.tokens.cuts(row.y, lambda m: m.end() <= last)

    def _sequence(self, row: Pair, parts: list[Encoded], cuts: tuple[int, ...], ends: _Ends) -> Sequence:
        encoded, border, notes = self._bordered(row, parts, cuts)
        if self.options.control != "parse":
            refuse_alike(self.tokens, encoded, {"x": row.x, "y": row.y})
        head, tail = ([self._end(token) for token in some] for some in (ends.bos, ends.eos))
        whole = joined([*head, encoded, *tail])
        n, m = len(head), len(head) + len(encoded.ids)
        stop = m - (ends.has_eos and m > n + border)
        # A BOS that x itself begins with is one, too.
        start = n or int(ends.has_bos and border > 0 and encoded.ids[0] == self.tokens.tokenizer.bos_token_id)
        segments = [
            Segment(0, start, "bos"),
            Segment(start, n + border, "prompt"),
            Segment(n + border, stop, "answer", output=True),
            Segment(stop, m + len(tail), "end_of_turn", output=True),
        ]
        weights = np.zeros(m + len(tail), np.float32)
        for s in segments:
            weights[s.start : s.stop] = weight_of(self.options.policy, Part(s.kind, s.output, last=s.output))
        weights *= np.float32(row.weight)
        if ends.eos:
            notes += (f"{ends.eos[0]} was appended to y",)
        pieces = Pieces(whole.text, whole.starts, whole.stops)
        return sequence_of(whole.ids, weights, segments, pieces, notes)

    def _end(self, token: str) -> Encoded:
        """A bos or an eos by itself, as one token."""
        ids = np.array([self.tokens.tokenizer.convert_tokens_to_ids(token)], np.int64)
        return Encoded(token, ids, np.array([0]), np.array([len(token)]), tiled=True)

    def _bordered(
        self, row: Pair, parts: list[Encoded], cuts: tuple[int, ...]
    ) -> tuple[Encoded, int, tuple[str, ...]]:
        """The encoded pair, how many of its tokens are x, and what was done where one token holds both.

        cuts: where x was cut.
        """
        if len(parts) == 2:
            notes = ("x and y are encoded apart",) if self.options.border == "split" else ()
            return joined(parts), len(parts[0].ids), notes
        (encoded,) = parts
        border = self.tokens.border(encoded, len(row.x), cuts)
        if border is not None:
            return encoded, border, ()
        first = across(encoded, len(row.x))
        if self.options.border in ("auto", "refuse") or first is None:
            raise straddle(encoded, len(row.x), "y")
        token = encoded.text[encoded.starts[first] : encoded.stops[first]]
        masked = self.options.border == "mask"
        side = "masked, as part of x" if masked else "counted as y"
        note = f"the token {token!r} holds the end of x and the beginning of y: {side}"
        return encoded, first + masked, (note,)


# === token ids ===========================================================================================


def token_job(row: TokenRow, options: Options) -> Job:
    """No text to encode, and the sequence. Raises RowError for an id that the tokenizer doesn't have."""
    _check_ids(row, len(options.tokens.tokenizer))
    return Job([], lambda parts: fitted([_sequence(row, options)], options.max_length, options.overflow))


def _check_ids(row: TokenRow, size: int) -> None:
    if len(unknown := np.flatnonzero(row.ids >= size)):
        what = f"the id {row.ids[unknown[0]]} isn't in this tokenizer's vocabulary of {size}"
        why = "the row was written with another tokenizer: the same ids would be other texts"
        raise RowError(what, reason="bad_token", field=f"token {unknown[0]}", why=why)


def _sequence(row: TokenRow, options: Options) -> Sequence:
    """Of y the policy's factor times the row's own weights; of the prompt the policy alone, as rows have no say in it.

    A token of weight 0 after the prompt is context by the row's own word, whatever the policy.
    """
    weights, segments = row.weights.copy(), row.segments()
    for s in segments:
        if s.output:
            weights[s.start : s.stop] *= weight_of(options.policy, Part(s.kind, True, last=True))
    weights[: row.prompt_length] = weight_of(options.policy, Part("prompt", False))
    texts = DecodedTokens(options.tokens.tokenizer, row.ids)
    return replace(sequence_of(row.ids, weights, segments, texts, row.notes), logged=row.logged)


_LONGEST = 8  # tokens of one character, or of two that are written together


class DecodedTokens(TokenTexts):
    """By decoding: of a character that is several tokens, the first has it and the others are empty.

    A token that the whole text doesn't show by itself has its name in the vocabulary.
    """

    __slots__ = ("_ids", "_tokenizer")

    def __init__(self, tokenizer: Any, ids: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self._tokenizer, self._ids = tokenizer, ids

    def __len__(self) -> int:
        return len(self._ids)

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:  # a tokenizer for each row is much to send
        return tuple, (self._all(),)

    def _cut(self) -> Iterator[str]:
        """The whole text cut where the texts of single tokens, or of a few together, stand in it."""
        ids, at, i = self._ids.tolist(), 0, 0
        whole = self._decode(ids)
        while i < len(ids):
            for count in range(1, min(_LONGEST, len(ids) - i) + 1):
                text = self._decode(ids[i : i + count])
                if "\ufffd" not in text and whole.startswith(found := text, at):
                    break
                if whole.startswith(found := f" {text}", at):  # decoders drop a space at the beginning
                    break
            else:
                count, found = 1, ""
            name = self._tokenizer.convert_ids_to_tokens(ids[i]) or ""
            yield found or name
            yield from [""] * (count - 1)
            at, i = at + len(found), i + count

    def _decode(self, ids: list[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))


# === rendered chats ======================================================================================
# The template is asked what it writes between the contents of messages: it renders a few conversations whose contents
# are marks, and the text between two marks is the separator of their roles. A text is cut at the first separator that
# fits, again and again. That is a guess, and it needs no proof of its own: only messages of which the template makes
# the same text are returned.


Render = Callable[[list[Message]], str]

# Letters alone: no template escapes, trims or splits them.
_MARKS = tuple(f"ygxmark{letter}" for letter in "abcdefg")
_START, _END = "start", "end"
# Conversations in which each pair of roles is met at the beginning, in the middle and at the end: templates that drop
# earlier thoughts write another header before the last reply.
_DIALOGUES = (
    ("user", "assistant", "user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "tool", "assistant", "user", "assistant"),
    ("user", "assistant", "tool", "tool", "assistant"),
)
_MOST_READINGS = 64  # of one text; separators of one pair of roles that begin alike give several


class RenderedChats:
    """Reads texts back for one template; it is asked for its separators once."""

    def __init__(self, render: Render, bos: str = "") -> None:
        self._render, self._bos = render, bos

    @cached_property
    def _separators(self) -> Separators:
        return separators_of(self._render)

    def __call__(self, row: Pair, refusal: RowError) -> tuple[Conversation, str]:
        """The conversation of a text, and a note. Raises RowError, the refusal itself for a text that is no chat."""
        if row.x:
            raise refusal
        messages = read_back(row.y, self._render, self._separators, self._bos)
        if messages is not None:
            note = f"the text is a rendered chat: it was read back into {len(messages)} messages"
            return Conversation(tuple(messages), weight=row.weight), note
        if not any(s.text.strip() and row.y.lstrip().startswith(s.text.strip()) for s in self._starts()):
            raise refusal
        raise RowError(
            "the text begins as a rendered chat, and no messages were found of which the template makes it",
            reason="rendered_chat",
            field=refusal.field,
            why="without messages nothing says which of its tokens are replies; trained whole, users' words are learnt",
            fix="give the messages, or the template that wrote the text (template_kwargs=, now=)",
        )

    def _starts(self) -> list[Separator]:
        return self._separators.get(_START, [])


class Separator(NamedTuple):
    """What a template writes between two contents, or before the first one, or after the last one (role `end`)."""

    role: str
    text: str


Separators = dict[str, list[Separator]]  # by the role before it


def separators_of(render: Render) -> Separators:
    """What the template writes between messages of two roles, longest first; empty for one that writes no marks."""
    found: dict[str, set[Separator]] = defaultdict(set)
    for roles in _DIALOGUES:
        messages = [{"role": r, "content": m} for r, m in zip(roles, _MARKS, strict=False)]
        try:
            between = _between(render(messages), len(roles))
        except RowError:  # a template refuses roles and orders as it likes
            continue
        if between is None:
            continue
        for before, role, text in zip((_START, *roles), (*roles, _END), between, strict=True):
            found[before].add(Separator(role, text))
    return {before: sorted(some, key=lambda s: -len(s.text)) for before, some in found.items()}


def _between(text: str, count: int) -> list[str] | None:
    """The texts before, between and after the marks; None unless each stands there once, in order."""
    parts: list[str] = []
    rest = text
    for mark in _MARKS[:count]:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return None
        parts.append(before)
    return [*parts, rest]


def read_back(text: str, render: Render, separators: Separators, bos: str = "") -> list[Message] | None:
    """Messages of which the template makes this text; None where none are found.

    The text may lack the white space after its last token, and the BOS that a tokenizer would add.
    """
    # A trainer that adds the BOS itself has texts without the template's.
    for whole in (text, bos + text) if bos else (text,):
        for messages in islice(_readings(whole, separators), _MOST_READINGS):
            try:
                again = render(messages)
            except RowError:  # as above
                continue
            if again.rstrip() == whole.rstrip():
                return messages
    return None


def _readings(text: str, separators: Separators) -> Iterator[list[Message]]:
    """Ways to read a text as messages, the likeliest first."""
    stack: list[tuple[int, str, tuple[tuple[str, str], ...]]] = []
    for s in reversed(separators.get(_START, [])):
        if text.startswith(s.text):
            stack.append((len(s.text), s.role, ()))
    while stack:
        at, role, done = stack.pop()
        for stop, s in reversed(_next(text, at, separators.get(role, []))):
            messages = (*done, (role, text[at:stop]))
            if s.role == _END:
                yield [{"role": r, "content": c} for r, c in messages]
            else:
                stack.append((stop + len(s.text), s.role, messages))


def _next(text: str, at: int, separators: list[Separator]) -> list[tuple[int, Separator]]:
    """The separators that a content from `at` on may end in: those found first, and the end of the text."""
    inner = [(text.find(s.text, at), s) for s in separators if s.role != _END and s.text]
    first = min((stop for stop, _ in inner if stop >= 0), default=-1)
    found = [(stop, s) for stop, s in inner if stop == first >= 0]
    trimmed = text.rstrip()
    for s in separators:
        if s.role == _END and first < 0 and trimmed.endswith(s.text.rstrip()):
            found.append((max(len(trimmed) - len(s.text.rstrip()), at), s))
    return found
