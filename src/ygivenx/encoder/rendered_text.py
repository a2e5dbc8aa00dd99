"""Texts that are rendered chats, read back into messages where the template writes exactly this text of them.

The template is asked what it writes between the contents of messages: it renders a few conversations whose contents are
marks, and the text between two marks is the separator of their roles. A text is cut at the first separator that fits,
again and again. That is a guess, and it needs no proof of its own: only messages of which the template makes the same
text are returned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from ..errors import RowError
from ..rows.nouns import Conversation, Message, Pair

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
