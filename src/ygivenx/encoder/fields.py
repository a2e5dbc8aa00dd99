"""What a template leaves out: fields of a row that its rendering doesn't hold."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .inputs import REASONING_FIELDS
from .origins import Source
from .renderings import Draft, Turn
from .tracing import Traced

_THINK_TAG = re.compile("</?think>")  # read as a mark of reasoning, and written anew by the template


def lost_of_reply(draft: Draft, turn: Turn, message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(path, field) of what the reply holds and its output doesn't, such as `messages[3].tool_calls[0]...`."""
    if turn.traced is None and draft.traced is None:
        return list(_missing_text(draft.text[turn.start : turn.stop], turn.message, message))
    traced = turn.traced or draft.traced
    assert traced is not None
    return [
        (_key(s), s.field or "") for s in _lost(traced, _said(traced, turn.start, turn.stop), turn.message)
    ]


def printed_arguments(text: str, message: Mapping[str, Any]) -> str | None:
    """The path of a call's arguments that a reply's text has as Python prints them, which isn't JSON."""
    for i, call in enumerate(message.get("tool_calls") or []):
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, Mapping) and arguments and repr(arguments) in text:
            return f"tool_calls[{i}].function.arguments"
    return None


def lost_of_context(draft: Draft, trained: set[int], upto: int) -> list[str]:
    """Paths of what the messages around the trained replies, and tools and documents, hold in vain."""
    traced = draft.traced
    if traced is None:
        return []
    said = _said(traced, 0, len(draft.text))
    paths = [
        _key(s)
        for s in _lost(traced, said)
        if s.message is not None and s.message not in trained and s.message < upto
    ]
    seen = {traced.sources[s].path.partition("[")[0] for _, s in traced.text.runs}
    given = {s.path.partition("[")[0] for s in traced.sources if s.message is None}
    return paths + sorted(({"tools", "documents"} & given) - seen)


def _lost(traced: Traced, said: Counter[str], message: int | None = None) -> Iterator[Source]:
    told: set[str] = set()
    for source in traced.sources:
        if (message is None or source.message == message) and _matters(source):
            key, text = _key(source), source.text
            wanted = len(_bare(_THINK_TAG.sub("", text) if "think>" in text else text))
            if said[key] < wanted and key not in told:
                told.add(key)
                yield source


def _said(traced: Traced, start: int, stop: int) -> Counter[str]:
    """How many characters, white space apart, each field has in text[start:stop]."""
    runs, text = traced.text.runs, str.__str__(traced.text)
    first = bisect_right(runs, start, key=lambda r: r[0])
    by_source: dict[int, int] = {}
    at = start
    for end, s in runs[first:]:
        if s:
            by_source[s] = by_source.get(s, 0) + len(_bare(text[at : min(end, stop)]))
        if end >= stop:
            break
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
    return "".join(text.split())


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
