"""A row's text is not control: special tokens that it writes are refused, or cut so that they are encoded as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from re import Match
from typing import Any

from ..errors import RowError
from .assemble import control_text
from .inputs import ROLES, Inputs
from .origins import Source, within
from .renderings import Draft
from .tokens import Tokens


def refuse_control(tokens: Tokens, inputs: Inputs) -> None:
    """Raise RowError if a text of the row, or the name of a field, holds a special token."""
    given = {
        "messages": inputs.messages,
        "tools": inputs.tools,
        "documents": inputs.documents,
        **inputs.kwargs,
    }
    if not tokens.has_control(json.dumps(given, ensure_ascii=False, default=str)):
        return
    for path, text in _leaves(given):
        if found := tokens.has_control(text):
            raise control_text(found[0], path)


def control_cuts(tokens: Tokens, draft: Draft, control: str) -> tuple[int, ...]:
    """Where the text is cut so that no control token is made of a row's characters.

    Raises RowError where control="refuse" and the template and the row write such a token together, and where the
    origin of characters isn't known.
    """
    if control == "parse":
        return ()
    traced = next((t.traced for t in draft.turns if t.traced), draft.traced)
    if traced is None:
        what = "the origin of this text's characters can't be followed through the template"
        why = "so control tokens of the row's can't be told from the template's"
        raise RowError(what, reason="no_origins", why=why, fix="control='parse' trusts the row")
    runs, sources = traced.text.runs, traced.sources

    def foreign(found: Match[str]) -> Source | None:
        inside = (sources[s] for s in within(runs, *found.span()) if s)
        return next((s for s in inside if s.field != "role" or s.text not in ROLES), None)

    cuts = tokens.cuts(draft.text, lambda found: foreign(found) is not None)
    if cuts and control == "refuse":
        found = tokens.control(draft.text, cuts[0] - 1)[0]
        source = foreign(found)
        raise control_text(
            found[0], source.path if source else "", "the template and the row write it together"
        )
    return cuts


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
