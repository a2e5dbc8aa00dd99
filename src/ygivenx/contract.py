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

from .errors import RowError
from .template import Inputs, Template, Traced
from .tokens import Tokens

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

    def __init__(self, template: Template, inputs: Inputs) -> None:
        self.template, self.inputs = template, inputs
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

    def traced(self, stop: int) -> Traced | None:
        if stop not in self._traced:
            self._traced[stop] = self.template.trace(self.inputs.upto(stop), self.closed(stop))
        return self._traced[stop]

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

    def drafts(self, row: Row, wanted: Iterable[int]) -> list[Draft]:
        """The texts that train the wanted messages; raises RowError where no text can."""
        turns = [self.turn(row, i) for i in wanted]
        longest = max(turns, key=lambda t: t.stop, default=None)
        text = row.whole
        if longest is not None and longest.proven.startswith(text):  # the next header would end the last turn
            text = longest.proven
        if all(text.startswith(t.proven) for t in turns):
            return [Draft(text, tuple(turns), len(row), row.traced(len(row)))]
        note = "the template writes earlier turns differently once they are history: one sequence per turn"
        return [Draft(t.text, (t,), t.message + 1, row.traced(t.message + 1), (note,)) for t in turns]

    def turn(self, row: Row, i: int) -> Turn:
        """The proof for message i."""
        shown, text = self._prompt(row, i), row.closed(i + 1)
        if not text.startswith(shown):
            raise _not_continued(i, shown, text)
        last = self._last_character(row, i)
        end, token = self._end_of_turn(row, i, max(last, len(shown)))
        if end < len(text):
            return Turn(i, text, len(shown), end, end + len(token))
        note = f"messages[{i}]: the header of the next turn, {token!r}, ends it"
        return Turn(i, text + token, len(shown), end, end + len(token), (note,))

    def _prompt(self, row: Row, i: int) -> str:
        try:
            return row.prompt(i)
        except RowError as e:
            what = "no reply can be asked for here: the template fails on what stands before it"
            fix = "give this message the weight 0, so that it is context"
            raise RowError(what, reason="no_prompt", field=f"messages[{i}]", why=e.why, fix=fix) from e

    def _last_character(self, row: Row, i: int) -> int:
        """One past the last character of F that comes from message i, as far as origins are known."""
        text, whole = row.closed(i + 1), row.whole
        traced = row.traced(len(row) if whole.startswith(text) else i + 1)
        if traced is None:
            return 0
        runs = traced.text.runs
        ends = [stop for stop, s in runs if traced.sources[s].message == i and stop <= len(text)]
        return ends[-1] if ends else 0

    def _end_of_turn(self, row: Row, i: int, after: int) -> tuple[int, str]:
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
        if found is None:
            raise RowError(
                "nothing ends this turn",
                reason="no_end_of_turn",
                field=f"messages[{i}]",
                why=f"after it the template writes {_quoted(text[after:])}: a model trained on it never stops",
                fix=f"repair='append_end' appends {self.tokens.tokenizer.eos_token!r}, or give another template",
            )
        return found

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
