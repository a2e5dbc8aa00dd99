"""A sequence for the eye: trained tokens coloured in a terminal, ⟦bracketed⟧ in plain text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import groupby

import numpy as np

# C0 and C1 controls would reach the reader's terminal as commands: show their pictures instead.
_PICTURES = {c: 0x2400 + c for c in range(0x20)} | {0x7F: 0x2421}
# These have no pictures: C1; what reorders the characters around it, so that a text reads otherwise than it is; and
# half a surrogate pair, which can't be printed.
_NAMELESS = dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
_ESCAPES = {c: f"\\u{c:04x}" for c in (0x7F, *_NAMELESS, *_SURROGATES)}  # JSON itself escapes C0
_VISIBLE = {c: p for c, p in (_PICTURES | _NAMELESS | _SURROGATES).items() if c not in (0x0A, 0x09)}


def visible(text: str) -> str:
    """`text` as a terminal may have it: controls (but newline and tab) and overrides of direction as pictures."""
    return text.translate(_VISIBLE)


def visible_json(document: str) -> str:
    """A JSON document that means the same, with what `visible` replaces as escapes."""
    return document.translate(_ESCAPES)


def plural(count: int, noun: str) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def wants_colour() -> bool:
    """Whether standard output is a terminal that nobody asked to keep plain (no-color.org)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def coloured(
    texts: Iterable[str], weights: np.ndarray, notes: Iterable[str] = (), colour: bool | None = None
) -> str:
    """Texts of tokens with the trained ones marked, then one line of counts and the notes."""
    colour = wants_colour() if colour is None else colour
    mark = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    dim = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
    runs = groupby(zip(texts, weights, strict=True), key=lambda tw: float(tw[1]))
    parts = []
    for weight, run in runs:
        start, stop = mark if weight > 0 else dim
        body = visible("".join(t for t, _ in run))
        label = f"×{weight:g}" if weight not in (0.0, 1.0) else ""
        parts.append(f"{start}{body}{label}{stop}")
    trained = int((weights > 0).sum())
    lines = [
        "".join(parts),
        f"[{len(weights)} tokens, {trained} trained, weight {weights.sum():g}]",
    ]
    lines += [f"note: {visible(note)}" for note in notes]
    return "\n".join(lines)
