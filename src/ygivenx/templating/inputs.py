"""What a chat template sees of a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from ..errors import RowError
from ..rows.weights import WEIGHT_KEYS

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the names that transformers unites
_UNSEEN = frozenset({*WEIGHT_KEYS, "spans"})  # what a message says about its weights
# A template may build a header from a role's name, such as '<|' + role + '|>'.
ROLES = frozenset(
    {"system", "user", "assistant", "tool", "developer", "function", "ipython", "model", "observation"}
)


class Used:
    """What the renderings of one row took until now, and the refusal of one that took too much."""

    __slots__ = ("refusal", "seconds", "until")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.until = 0.0  # of the processor's time; 0 while its second is not over
        self.refusal: RowError | None = None


@dataclass(frozen=True)
class Inputs:
    """What a template sees of a row: messages without nulls and weights, and its further arguments.

    now: the time, which some templates write; it stands still, as renderings are compared, and rows of one shape
    share a proof. written: the JSON of the row's values, made once for all its renderings, whose time `used` adds up.
    """

    messages: tuple[dict[str, Any], ...]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)
    written: dict[Any, tuple[Any, str]] = field(default_factory=dict, compare=False, repr=False)
    used: Used = field(default_factory=Used, compare=False, repr=False)

    @cached_property
    def size(self) -> int:
        """The characters of all texts."""
        size, left = 0, [list(self.messages), self.tools, self.documents, self.kwargs]
        while left:
            value: Any = left.pop()
            if isinstance(value, str):
                size += len(value)
            elif isinstance(value, Mapping):
                left += [*value, *value.values()]
            elif isinstance(value, list | tuple):
                left += value
        return size

    @property
    def further_rounds(self) -> int:
        """What a long row may take beyond what any may, in rounds of loops, of one rendering."""
        return 4 * self.size

    @property
    def further_seconds(self) -> float:
        """Likewise in seconds, of all renderings: templates go through all messages for each turn."""
        return self.size / 100_000 + len(self.messages) ** 2 / 50_000

    def upto(self, stop: int, *more: dict[str, Any]) -> Inputs:
        """The same with messages[:stop] and `more`."""
        return replace(self, messages=self.messages[:stop] + more)


def inputs_of(
    messages: Iterable[Mapping[str, Any]], tools: Any, documents: Any, kwargs: Any, now: datetime
) -> Inputs:
    """Inputs as transformers prepares them: no nulls, reasoning under each of its names; and no weights."""
    return Inputs(tuple(map(_prepared, messages)), tools, documents, kwargs, now)


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    m = {k: v for k, v in message.items() if v is not None and k not in _UNSEEN}
    reasoning = next((m[k] for k in REASONING_FIELDS if k in m), None)
    return m if reasoning is None else {"thinking": reasoning, **m, "reasoning_content": reasoning}
