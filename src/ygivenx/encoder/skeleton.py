"""Origins without tracing, for rows like rows that were traced.

A chat whose messages hold nothing but text is mostly the template's own words with the contents between them. Once
a traced row has shown which words stand between a role and the next, a rendering that is made of known words
and of all its contents, in order and whole, has the same origins. Anything else is traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .origins import TEMPLATE, Runs, Source, text_with, within
from .template import Inputs, Traced

# A template may build a header from a role's name, such as '<|' + role + '|>'.
ROLES = frozenset(
    {"system", "user", "assistant", "tool", "developer", "function", "ipython", "model", "observation"}
)
_MOST = 10_000  # gaps remembered
_START, _END = "", ""  # the roles before the first and after the last message

Gap = tuple[str, str, str]  # role, role, the words between their contents
Place = tuple[int, int]


class Skeletons:
    """The words that one template writes between contents."""

    def __init__(self) -> None:
        self._known: set[Gap] = set()

    def trace(self, text: str, inputs: Inputs) -> Traced | None:
        """The text by origins if all its words are known; else None."""
        if not self._known or not _plain(inputs):
            return None
        places = _places(text, inputs.messages)
        if places is None or not self._known.issuperset(_gaps(text, inputs.messages, places)):
            return None
        sources, runs = [Source("template")], []
        for i, (start, stop) in enumerate(places):
            sources.append(Source(f"messages[{i}].content", i, "content", inputs.messages[i]["content"]))
            runs += [(start, TEMPLATE), (stop, i + 1)] if start else [(stop, i + 1)]
        if places[-1][1] < len(text):
            runs.append((len(text), TEMPLATE))
        return Traced(text_with(text, tuple(runs)), tuple(sources), complete=True)

    def learn(self, traced: Traced, inputs: Inputs) -> None:
        """Remember the words of a traced rendering, if between its contents nothing comes from the row."""
        if not _plain(inputs) or len(self._known) > _MOST:
            return
        text, runs = str.__str__(traced.text), traced.text.runs
        places = _places(text, inputs.messages)
        if places is None:
            return
        bare = [(a, b) for a, b in _between(places, len(text)) if a < b]
        owned = all(_all_of(runs, traced.sources, place, i) for i, place in enumerate(places))
        if owned and all(_own_words(runs, traced.sources, place) for place in bare):
            self._known.update(_gaps(text, inputs.messages, places))


def _plain(inputs: Inputs) -> bool:
    alone = not (inputs.tools or inputs.documents or inputs.kwargs) and bool(inputs.messages)
    return alone and all(
        m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in inputs.messages
    )


def _places(text: str, messages: Sequence[Mapping[str, Any]]) -> list[Place] | None:
    """Where each content stands, white space around it apart; None unless all do, in order."""
    places, at = [], 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, at) if content else -1
        if start < 0:
            return None
        at = start + len(content)
        places.append((start, at))
    return places


def _between(places: list[Place], length: int) -> list[Place]:
    return list(zip([0, *(b for _, b in places)], [*(a for a, _ in places), length], strict=True))


def _gaps(text: str, messages: Sequence[Mapping[str, Any]], places: list[Place]) -> list[Gap]:
    roles = [_START, *(str(m["role"]) for m in messages), _END]
    spans = _between(places, len(text))
    return [(one, other, text[a:b]) for one, other, (a, b) in zip(roles, roles[1:], spans, strict=False)]


def _all_of(runs: Runs, sources: Sequence[Source], place: Place, message: int) -> bool:
    return all((sources[s].message, sources[s].field) == (message, "content") for s in within(runs, *place))


def _own_words(runs: Runs, sources: Sequence[Source], place: Place) -> bool:
    found = (sources[s] for s in within(runs, *place) if s != TEMPLATE)
    return all(s.field == "role" and s.text in ROLES for s in found)
