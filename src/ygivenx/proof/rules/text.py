"""Rules about the text that is trained on: the same as inference shows, whole, and kept apart."""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import UNKNOWN, Evidence, ObservedRow
from .base import Hit, rule
from .shared import (
    EXAMPLES,
    STRAY,
    first_lost,
    lacks_opening,
    leaks_of,
    located,
    lost_tokens,
    of_history,
    of_kind,
    stray_tokens,
    tokens,
    weighted_in,
)


@rule(
    "context-differs",
    "error",
    why="The ids that are trained on aren't those that inference would show: what is learned applies to a "
    "context that never occurs.",
    fix="Render with the model's chat template and its generation prompt, once, without added special "
    "tokens.",
)
def context_differs(ev: Evidence) -> Iterator[Hit]:
    rows = [s for s in ev.seen if s.pieces and all(p.proven for p in s.pieces)]
    message = "rows differ from what the chat template shows at inference"
    found = [d for s in rows if not _is_whole(s) and (d := _difference(ev, s))]
    yield Hit(message, len(found), len(rows), tuple(found[:EXAMPLES]))
    pieces = [(s, p) for s in rows for p in s.pieces]
    bare = [(s.where, p.sequence.ids[: p.missing_head][:24]) for s, p in pieces if lacks_opening(p)]
    message = "documents lack the system prompt or tools that inference shows first"
    yield from located(ev, message, bare, len(pieces))
    yield from tokens(ev, "tokens of replies are trained that inference shows as context alone", of_history)


def _is_whole(s: ObservedRow) -> bool:
    """Whether documents explain all tokens of a row, and nothing of them is missing."""
    return (
        bool(s.codes.all()) and all(p.matched.all() for p in s.pieces) and not bool(of_kind(s, UNKNOWN).any())
    )


def _difference(ev: Evidence, s: ObservedRow) -> dict[str, str]:
    """What a row has too much or lacks; empty if nothing."""
    stray = stray_tokens(s)
    lost = sum(int(lost_tokens(p).sum()) for p in s.pieces)
    if not stray.any() and not lost:
        return {}
    text = ev.text(s.ids[stray][:12]) or ev.text(first_lost(s))
    return {
        "where": s.where,
        "difference": f"{int(stray.sum())} tokens too many, {lost} missing",
        "text": text,
    }


@rule(
    "doubled-bos",
    "error",
    why="Two beginning-of-sequence tokens are a context that the model never saw, and that inference won't "
    "show.",
    fix="Tokenise the template's text with add_special_tokens=False.",
)
def doubled_bos(ev: Evidence) -> Iterator[Hit]:
    bos = getattr(ev.tokenizer, "bos_token_id", None)
    if bos is None:
        return
    rows = [(s.where, s.ids[s.attended]) for s in ev.seen] or [
        (ev.encoded.name(n), s.ids[:12]) for n, s in enumerate(ev.encoded.bare_ones())
    ]
    twice = [(where, ids[:12]) for where, ids in rows if len(ids) > 1 and ids[0] == ids[1] == bos]
    yield from located(ev, "rows begin with two BOS tokens", twice, len(rows))


@rule(
    "y-truncated",
    "warning",
    why="The end of y was cut off with its end-of-turn token: the model learns to stop nowhere, or to stop "
    "early.",
    fix="Raise max_length, shorten x, or leave such rows out by name; where the end alone is missing, write the turn's "
    "end token.",
)
def y_truncated(ev: Evidence) -> Iterator[Hit]:
    pieces = [(s, p) for s in ev.seen for p in s.pieces]
    cut = [
        (s.where, p.sequence.ids[p.missing_tail][:20])
        for s, p in pieces
        if not p.matched[-1] and weighted_in(p.sequence)[p.missing_tail].any()
    ]
    yield from located(ev, "documents lose part of their y at the end", cut, len(pieces))


@rule(
    "document-cut",
    "error",
    why="The row begins in the middle of a document: its y is trained without its x.",
    fix="Pack whole documents (packing_strategy='bfd'), or one document a row.",
)
def document_cut(ev: Evidence) -> Iterator[Hit]:
    pieces = [(s, p) for s in ev.seen for p in s.pieces]
    cut = [
        (s.where, s.ids[p.start : p.start + 16])
        for s, p in pieces
        if p.missing_head > STRAY // 4 and not lacks_opening(p)
    ]
    yield from located(ev, "documents are trained without their beginning", cut, len(pieces))


@rule(
    "packing-leak",
    "error",
    why="Packed documents attend to each other: an answer is conditioned on somebody else's conversation.",
    fix="Restart position_ids with padding-free collation, or give a block-diagonal mask.",
)
def packing_leak(ev: Evidence) -> Iterator[Hit]:
    yield from leaks_of(ev, "document", "documents depend on other documents of their row")


@rule(
    "padding-attended",
    "error",
    why="Real tokens attend to padding: their hidden states change with the length of their neighbours.",
    fix="Pass attention_mask.",
)
def padding_attended(ev: Evidence) -> Iterator[Hit]:
    yield from leaks_of(ev, "padding", "rows depend on their padding")
