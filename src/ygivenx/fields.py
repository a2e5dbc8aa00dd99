"""What a template leaves out: fields of a row that its rendering doesn't hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .contract import Draft, Turn
from .template import REASONING_FIELDS, Source, Traced

_THINK_TAG = re.compile("</?think>")  # read as a mark of reasoning, and written anew by the template
_SPACE = re.compile(r"\s+")


def lost_of_reply(draft: Draft, turn: Turn, message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(path, field) of what the reply holds and its output doesn't, such as `messages[3].tool_calls[0]...`."""
    if turn.traced is None and draft.traced is None:
        return list(_missing_text(draft.text[turn.start : turn.stop], turn.message, message))
    traced = turn.traced or draft.traced
    assert traced is not None
    return [(_key(s), s.field or "") for s in _lost(traced, turn.message, turn.start, turn.stop)]


def lost_of_context(draft: Draft, trained: set[int], upto: int) -> list[str]:
    """Paths of what the messages around the trained replies, and tools and documents, hold in vain."""
    traced = draft.traced
    if traced is None:
        return []
    paths = [_key(s) for i in range(upto) if i not in trained for s in _lost(traced, i, 0, len(draft.text))]
    seen = {traced.sources[s].path.partition("[")[0] for _, s in traced.text.runs}
    given = {s.path.partition("[")[0] for s in traced.sources if s.message is None}
    return paths + sorted(({"tools", "documents"} & given) - seen)


def _lost(traced: Traced, message: int, start: int, stop: int) -> Iterator[Source]:
    said = _said(traced, message, start, stop)
    told: set[str] = set()
    for source in traced.sources:
        if source.message == message and _matters(source):
            wanted = len(_bare(_THINK_TAG.sub("", source.text)))
            if said[_key(source)] < wanted and _key(source) not in told:
                told.add(_key(source))
                yield source


def _said(traced: Traced, message: int, start: int, stop: int) -> Counter[str]:
    """How many characters, white space apart, each field of a message has in text[start:stop]."""
    by_source: Counter[int] = Counter()
    at = 0
    for end, s in traced.text.runs:
        a, b = max(at, start), min(end, stop)
        if a < b and traced.sources[s].message == message:
            by_source[s] += len(_bare(traced.text[a:b]))
        at = end
    said: Counter[str] = Counter()
    for s, count in by_source.items():  # reasoning stands under several names: one of them is enough
        key = _key(traced.sources[s])
        said[key] = max(said[key], count)
    return said


def _key(source: Source) -> str:
    """The path, one for all names of reasoning."""
    return (
        f"messages[{source.message}].{REASONING_FIELDS[0]}"
        if source.field in REASONING_FIELDS
        else source.path
    )


def _matters(source: Source) -> bool:
    if source.field in ("content", *REASONING_FIELDS):
        return not source.path.endswith(("(key)", "].type"))
    return source.field == "tool_calls" and (
        source.path.endswith(".name") or ".arguments" in source.path.removesuffix(".arguments (key)")
    )


def _bare(text: str) -> str:
    return _SPACE.sub("", str.__str__(text))


def _missing_text(output: str, i: int, message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("content", "reasoning_content"):
        value = message.get(name)
        if isinstance(value, str) and _bare(_THINK_TAG.sub("", value)) not in _bare(
            _THINK_TAG.sub("", output)
        ):
            yield f"messages[{i}].{name}", name
    for n, call in enumerate(message.get("tool_calls") or []):
        if call.get("function", call).get("name", "") not in output:
            yield f"messages[{i}].tool_calls[{n}].name", "tool_calls"
