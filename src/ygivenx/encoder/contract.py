"""Which characters a model has to produce: the contract between a rendered conversation and inference.

For an assistant message i, P = render(messages[:i], add_generation_prompt=True) is what inference shows, and
F = render(messages[:i+1]). The output is O = F[len(P) : end of turn], and must satisfy: F starts with P; O ends
in the token that ends the turn. One text serves all turns if it starts with each P + O (`single`); else every
turn gets its own (`split`). What satisfies neither is refused with the place where the two texts part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import RowError
from .origins import TEMPLATE, Text, join
from .repair import OPENED, own_reasoning
from .skeleton import Skeletons
from .template import Inputs, Marked, Template, Traced, marked
from .tokens import Tokens

_REWRITTEN = (
    "the template writes earlier turns differently once they are history: each reply has its own sequence"
)
_CLOSE = "\n</think>\n\n"
_SHOWN = 40  # characters of a text that an error quotes


@dataclass(frozen=True, slots=True)
class Turn:
    """Message `message` is produced as text[start:stop], of which text[end:stop] is the token that ends it.

    `text` is at least P + O, `notes` what was mended.
    """

    message: int
    text: str
    start: int
    end: int
    stop: int
    traced: Traced | None = None  # of a text that a repair put together
    notes: tuple[str, ...] = ()

    @property
    def proven(self) -> str:
        """P + O."""
        return self.text[: self.stop]


@dataclass(frozen=True, slots=True)
class Draft:
    """A text to be encoded, with the turns that it trains; `upto`: it renders messages[:upto]."""

    text: str
    turns: tuple[Turn, ...]
    upto: int
    traced: Traced | None = None
    notes: tuple[str, ...] = ()


class Row:
    """One conversation under one template: its renderings, each made once."""

    def __init__(self, template: Template, inputs: Inputs, skeletons: Skeletons | None = None) -> None:
        self.template, self.inputs, self.skeletons = template, inputs, skeletons
        self._prompts: dict[int, str] = {}
        self._closed: dict[int, str] = {}
        self._traced: dict[int, Traced | None] = {}

    def __len__(self) -> int:
        return len(self.inputs.messages)

    def prompt(self, i: int) -> str:
        """P: what inference shows before message i."""
        if i not in self._prompts:
            self._prompts[i] = self.template.render(self.inputs.upto(i), add_generation_prompt=True)
        return self._prompts[i]

    def closed(self, stop: int) -> str:
        """F: messages[:stop] and nothing after them."""
        if stop not in self._closed:
            self._closed[stop] = self.template.render(self.inputs.upto(stop))
        return self._closed[stop]

    @cached_property
    def marked(self) -> Marked:
        return marked(self.inputs)

    def traced(self, stop: int) -> Traced | None:
        """`closed(stop)` with the origin of each character, where that can be known."""
        if stop not in self._traced:
            known = self.skeletons and self.skeletons.trace(self.closed(stop), self.inputs.upto(stop))
            self._traced[stop] = known or self.fully_traced(stop)
        return self._traced[stop]

    def fully_traced(self, stop: int) -> Traced | None:
        """The same from a rendering of marked inputs, whose sources all such renderings share."""
        traced = self.template.trace(self.marked.upto(stop), self.closed(stop))
        if traced and self.skeletons:
            self.skeletons.learn(traced, self.inputs.upto(stop))
        return traced

    def said(self, text: str, i: int, field: str) -> Text:
        """A text that comes from a field of message i."""
        sources = enumerate(self.marked.sources)
        return Text.of(text, next((n for n, s in sources if (s.message, s.field) == (i, field)), TEMPLATE))

    @cached_property
    def whole(self) -> str:
        return self.closed(len(self))

    def replies(self) -> list[int]:
        return [i for i, m in enumerate(self.inputs.messages) if m.get("role") == "assistant"]


class Contract:
    """Proves the turns of conversations for one tokenizer; remembers how its template closes turns."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._closings: dict[tuple[str, str, bool], tuple[int, str] | None] = {}

    def drafts(self, row: Row, wanted: Iterable[int], repairs: frozenset[str] = frozenset()) -> list[Draft]:
        """The texts that train the wanted messages; raises RowError where no text can."""
        text = row.whole
        turns = [self.turn(row, i, repairs) for i in wanted]
        if turns and turns[-1].proven.startswith(text):  # the next header ends the last turn
            text = turns[-1].proven
        if all(text.startswith(t.proven) for t in turns):
            return [Draft(text, tuple(turns), len(row), row.traced(len(row)))]
        return [
            Draft(t.text, (t,), t.message + 1, t.traced or row.traced(t.message + 1), (_REWRITTEN,))
            for t in turns
        ]

    def rendered(self, row: Row, wanted: Iterable[int]) -> list[Draft]:
        """One text as the template writes the whole; outputs by the contract, else by origins, with a note."""
        text, turns = row.whole, []
        for i in wanted:
            try:
                turn = self.turn(row, i)
            except RowError:
                turn = None
            if turn is None or not text.startswith(turn.proven):
                turn = self._by_origin(row, i)
            turns.append(turn)
        return [Draft(text, tuple(turns), len(row), row.traced(len(row)))]

    def _by_origin(self, row: Row, i: int) -> Turn:
        traced = row.traced(len(row))
        runs = _runs_of(traced, i) if traced else []
        end = next(iter(self.tokens.control(row.whole, runs[-1][1])), None) if runs else None
        if end is None:
            what = "the rendered text doesn't say where this reply begins and ends"
            raise RowError(what, reason="no_origin", field=f"messages[{i}]", fix="use context='inference'")
        note = f"messages[{i}]: as rendered, which differs from what inference shows"
        return Turn(i, row.whole, runs[0][0], end.start(), end.end(), notes=(note,))

    def turn(self, row: Row, i: int, repairs: frozenset[str] = frozenset()) -> Turn:
        """The proof for message i."""
        shown, text = self._prompt(row, i), row.closed(i + 1)
        if not text.startswith(shown):
            mended = joined(self, row, i, repairs)
            if mended is None:
                raise _not_continued(i, shown, text)
            return mended
        last = self.last_character(row, i)
        try:
            end, token = self.end_of_turn(row, i, max(last, len(shown)))
        except RowError:
            if "append_end" not in repairs:
                raise
            return self._with_end(i, text, max(last, len(shown)), len(shown))
        if end < len(text):
            return Turn(i, text, len(shown), end, end + len(token))
        note = f"messages[{i}]: the header of the next turn, {token!r}, ends it"
        return Turn(i, text + token, len(shown), end, end + len(token), notes=(note,))

    def _with_end(self, i: int, text: str, end: int, start: int) -> Turn:
        eos = self.tokens.tokenizer.eos_token
        if not eos:
            what = "append_end needs an eos token, and the tokenizer has none"
            raise RowError(
                what, reason="no_end_of_turn", field=f"messages[{i}]", fix="set tokenizer.eos_token"
            )
        note = f"messages[{i}]: {eos!r} was appended, as nothing ends the turn"
        return Turn(i, text[:end] + eos, start, end, end + len(eos), notes=(note,))

    def _prompt(self, row: Row, i: int) -> str:
        try:
            return row.prompt(i)
        except RowError as e:
            what = "no reply can be asked for here: the template fails on what stands before it"
            fix = "give this message the weight 0, so that it is context"
            raise RowError(what, reason="no_prompt", field=f"messages[{i}]", why=e.why, fix=fix) from e

    def last_character(self, row: Row, i: int) -> int:
        """One past the last character of F that comes from message i, as far as origins are known."""
        text, whole = row.closed(i + 1), row.whole
        traced = row.traced(len(row) if whole.startswith(text) else i + 1)
        if traced is None:
            return 0
        ends = [stop for _, stop in _runs_of(traced, i) if stop <= len(text)]
        return ends[-1] if ends else 0

    def end_of_turn(self, row: Row, i: int, after: int) -> tuple[int, str]:
        """Where the token that ends message i stands in F, and the token; after F if it is the next header's."""
        text, message = row.closed(i + 1), row.inputs.messages[i]
        calls = message.get("tool_calls") or []
        following = next((j for j in row.replies() if j > i), None)
        if following is not None or i + 1 < len(row):
            found = self._closing(text, after, lambda: _or_none(row.prompt, following or len(row)))
        else:
            key = (row.template.source, text[after:], bool(calls))
            if key not in self._closings:
                found = self._closing(text, after, lambda: _next_turn(row, i, calls))
                self._closings[key] = found and (found[0] - after, found[1])
            known = self._closings[key]
            found = known and (after + known[0], known[1])
        found = found or self._next_header(row, i, after)
        if found is None:
            raise RowError(
                "nothing ends this turn",
                reason="no_end_of_turn",
                field=f"messages[{i}]",
                why=f"after it the template writes {_quoted(text[after:])}: a model trained on it never stops",
                fix=f"repair='append_end' appends {self.tokens.tokenizer.eos_token!r}, or give another template",
            )
        return found

    def _next_header(self, row: Row, i: int, after: int) -> tuple[int, str] | None:
        """The special token that follows message i once it is history, where F itself ends with its text."""
        text, then = row.closed(i + 1), row.inputs.upto(i + 1, {"role": "user", "content": "x"})
        plain = _or_none(lambda _: row.template.render(then, add_generation_prompt=True), i)
        traced = row.template.trace(marked(then), plain, add_generation_prompt=True) if plain else None
        runs = _runs_of(traced, i) if traced else []
        if text[after:].strip() or not runs or plain is None:
            return None
        gap = next(iter(self.tokens.control(plain, runs[-1][1])), None)
        return (len(text), gap[0]) if gap and not plain[runs[-1][1] : gap.start()].strip() else None

    def _closing(self, text: str, after: int, following: Callable[[], str | None]) -> tuple[int, str] | None:
        then = following() or ""
        common = common_prefix(text, then)
        inside = self.tokens.control(text, after)
        shared = [m for m in inside if m.end() <= common]
        for found, fallback in ((shared, -1), (inside, 0)):
            stops = [m for m in found if m[0] in self.tokens.stops]
            if found:
                end = stops[0] if stops else found[fallback]
                return end.start(), end[0]
        header = next(iter(self.tokens.control(then, common)), None)
        if header is not None and header.start() == common == len(text):
            return len(text), header[0]
        return None


def _runs_of(traced: Traced, message: int) -> list[tuple[int, int]]:
    """Characters [start, stop) of what a message says, its role's name apart."""
    runs, at = [], 0
    for stop, s in traced.text.runs:
        source = traced.sources[s]
        if source.message == message and source.field != "role":
            runs.append((at, stop))
        at = stop
    return runs


def joined(contract: Contract, row: Row, i: int, repairs: frozenset[str]) -> Turn | None:
    """P with the reply put after it by hand, where a repair allows it."""
    shown, text = row.prompt(i), row.closed(i + 1)
    opened, begin = OPENED.search(shown), _beyond(shown, text)
    end, token = contract.end_of_turn(row, i, contract.last_character(row, i))
    if opened and (said := _thought(row, i, text.startswith(shown[: opened.start()]), repairs)):
        what, parts = said
    elif "whitespace" in repairs and begin is not None:
        whole = row.fully_traced(i + 1)
        parts = [(whole.text if whole else text)[begin:end].lstrip()]
        what = "its prompt differs from the rendered row in white space alone, and is kept"
    else:
        return None
    prompt = row.template.trace(row.marked.upto(i), shown, add_generation_prompt=True)
    traced = prompt and Traced(join([prompt.text, *parts, token]), prompt.sources)
    stop = len(shown) + sum(map(len, parts))
    note = f"messages[{i}]: {what}; the ids differ from the template's"
    return Turn(i, "".join([shown, *parts, token]), len(shown), stop, stop + len(token), traced, (note,))


def _beyond(shown: str, text: str) -> int | None:
    """How much of `text` says all of `shown`, white space apart; None if it doesn't begin with it."""
    wanted, have = "".join(shown.split()), 0
    for at, character in enumerate(text):
        if have == len(wanted):
            return at
        if not character.isspace():
            if character != wanted[have]:
                return None
            have += 1
    return None


def _thought(row: Row, i: int, continues: bool, repairs: frozenset[str]) -> tuple[str, list[str]] | None:
    """What is done with the <think> that the prompt opens, and the reply that follows it."""
    message = row.inputs.messages[i]
    own, content = own_reasoning(message), message.get("content") or ""
    if message.get("tool_calls") or not isinstance(content, str):
        return None
    if own and "open_think" in repairs:
        name = "reasoning_content" if message.get("reasoning_content") else "content"
        said: list[str] = [row.said(own[0], i, name), _CLOSE, row.said(own[1], i, "content")]
        return "its own reasoning continues the <think> that the prompt opens", said
    if not own and continues and "empty_think" in repairs:
        return "the <think> that the prompt opens is closed at once", [
            _CLOSE,
            row.said(content, i, "content"),
        ]
    return None


def _next_turn(row: Row, i: int, calls: Sequence[Any]) -> str | None:
    """The rendering with what could come after message i: a user, or the results of its tool calls."""
    more: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    if calls:
        more = [_result(c) for c in calls]
    inputs = row.inputs.upto(i + 1, *more)
    return _or_none(lambda _: row.template.render(inputs, add_generation_prompt=True), i)


def _result(call: dict[str, Any]) -> dict[str, Any]:
    name = call.get("function", call).get("name", "f")
    made = {"role": "tool", "name": name, "content": "x"}
    return made | ({"tool_call_id": call["id"]} if "id" in call else {})


def _or_none(render: Callable[[int], str], i: int) -> str | None:
    try:
        return render(i)
    except RowError:
        return None


def common_prefix(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _not_continued(i: int, shown: str, text: str) -> RowError:
    at = common_prefix(shown, text)
    return RowError(
        "what the row holds doesn't continue what inference shows before this reply",
        reason="not_continued",
        field=f"messages[{i}]",
        why=f"after {_quoted(shown[max(0, at - _SHOWN) : at])} inference shows {_quoted(shown[at:])} where "
        f"the rendered row has {_quoted(text[at:])}",
        fix="make the reply begin as the prompt does, or choose a repair: see repair=",
    )


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN else repr(text[:_SHOWN]) + "…"
