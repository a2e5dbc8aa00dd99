"""Rules about the rows themselves, before any training."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from ...choices import Severity
from ...encoded import SegmentColumns
from ...sequence import Rejected
from ..evidence import Evidence
from .base import Hit, rule
from .shared import EXAMPLES, located, some

EMPTY = ("nothing_trained", "empty_pair")
# Reasons of the encoder that have a rule of their own.
NAMED = set(EMPTY)


def _quarantine_rule(name: str, severity: Severity, *reasons: str, found: str, why: str, fix: str) -> None:
    """Enter a rule that finds the rows which the encoder refused for one of `reasons`."""
    NAMED.update(reasons)
    rule(name, severity, why=why, fix=fix)(lambda ev: _quarantined(ev, found, *reasons))


_quarantine_rule(
    "control-text", "error", "control_text",
    found="rows forge control tokens",
    why="A row's text contains the template's control tokens: parsed, it forges turns that nobody wrote.",
    fix="Encode it as text (control='text'), or leave the row out, as the encoder does by default.",
)  # fmt: skip
_quarantine_rule(
    "prompt-not-continued", "warning", "not_continued", "no_thought",
    found="rows don't continue their prompt",
    why="The template renders the reply so that it doesn't continue what inference shows: training on it would "
    "teach a context that never occurs.",
    fix="Set the template's options (enable_thinking, ...) as at inference, or mend the template.",
)  # fmt: skip
_quarantine_rule(
    "reply-unasked", "warning", "no_prompt",
    found="rows have a reply that no prompt asks for",
    why="The template can't ask for a reply there, or writes its header only with the reply: what would be trained "
    "follows no prompt that inference shows.",
    fix="Give the message the weight 0, so that it is context.",
)  # fmt: skip
_quarantine_rule(
    "no-end-of-turn", "warning", "no_end_of_turn",
    found="rows have no end of turn",
    why="The template writes no token after the reply that would end it: the model can't learn to stop.",
    fix="Name the token that ends a turn (stops=), or mend the template.",
)  # fmt: skip
_quarantine_rule(
    "stop-inside-reply", "warning", "stop_inside",
    found="rows have a reply with a stop inside",
    why="The template writes a token inside the reply at which generation stops: a model can't produce in one turn "
    "what stands after it.",
    fix="Split the message there in two, such as one with the content and one with the calls.",
)  # fmt: skip
_quarantine_rule(
    "straddling-border", "warning", "straddling_token",
    found="rows have a token across the border of x and y",
    why="One token holds the end of x and the beginning of y; inference, which encodes x alone, never shows it.",
    fix="border='split' encodes x and y apart, border='mask' leaves the token out of y.",
)  # fmt: skip
_quarantine_rule(
    "field-dropped", "error", "dropped_field",
    found="rows have fields that the template drops",
    why="The rows have tool calls or reasoning, and the chat template doesn't write them: what would be trained "
    "is another conversation.",
    fix="Use a template that knows these fields.",
)  # fmt: skip
_quarantine_rule(
    "arguments-not-json", "error", "not_json",
    found="rows have calls whose arguments wouldn't be JSON",
    why="The template writes the arguments of calls as Python prints them: a model would be trained on calls that no "
    "parser reads.",
    fix="repair='arguments_as_text' gives them as JSON text; or use a template that writes JSON.",
)  # fmt: skip
_quarantine_rule(
    "too-long", "warning", "too_long", "y_too_long",
    found="rows are too long",
    why="The rows are longer than the encoder's max_length, and refused rather than cut in silence.",
    fix="Raise max_length, or choose what goes: overflow='drop_turns' or 'truncate'.",
)  # fmt: skip


@rule(
    "y-empty",
    "warning",
    why="Nothing of the row is trained, or nothing but the token that ends a turn: an empty reply, weights of 0, or a "
    "truncation that took all of y.",
    fix="Leave such rows out, or raise max_length.",
)
def y_empty(ev: Evidence) -> Iterator[Hit]:
    yield from _quarantined(ev, "rows have no y", *EMPTY)
    empty = [n for columns in ev.encoded.segments() for n in _with_empty_reply(columns)]
    found = [(ev.encoded.name(n), ev.encoded.bare(n).ids) for n in empty]
    yield from located(ev, "sequences have an empty reply: its end alone is trained", found, len(ev.encoded))


def _with_empty_reply(columns: SegmentColumns) -> list[int]:
    """The sequences in which all that a message gives to write is the token that ends it."""
    written = columns.output & (columns.stop > columns.start)
    message = np.stack([columns.sequence, columns.message], 1)
    ends = columns.of_kind("end_of_turn")
    texts = set(map(tuple, message[written & ~ends].tolist()))
    return [n for n, m in map(tuple, message[written & ends].tolist()) if (n, m) not in texts]


@rule(
    "rows-quarantined",
    "warning",
    why="The encoder can't read these rows; nothing of them is trained.",
    fix="Mend the rows, or leave them out; an example says what to do where something can be done.",
)
def rows_quarantined(ev: Evidence) -> Iterator[Hit]:
    for reason in sorted({r.reason for r in ev.rejected} - NAMED):
        yield from _quarantined(ev, f"rows are quarantined: {reason}", reason)


@rule(
    "nothing-read",
    "error",
    why="The file, the split or the set that was given holds no row: nothing was audited.",
    fix="Give the file that has the rows; check --split.",
)
def nothing_read(ev: Evidence) -> Iterator[Hit]:
    for what in ev.empty:
        yield Hit(f"there is nothing in {what}")


@rule(
    "rows-unrecognised",
    "warning",
    why="Rows of the batch are none of those that the audit was given: for them it can't know what is x and what "
    "is y, and has nothing to say of loss on x, of untrained y or ends, or of another context.",
    fix="Give the rows: yx.audit(rows, encoder, ...), or ygx probe --data FILE SCRIPT.",
)
def rows_unrecognised(ev: Evidence) -> Iterator[Hit]:
    unknown = [(s.where, s.ids[:16]) for s in ev.seen if not s.pieces]
    message = "rows are none of those that were given"
    yield from located(ev, message, unknown, len(ev.seen), "info", "warning")


@rule(
    "rows-missing",
    "info",
    why="Rows that were given are in no prepared row: a filter, a limit of length or a held-out part took them.",
    fix="Nothing, if it is meant.",
)
def rows_missing(ev: Evidence) -> Iterator[Hit]:
    if ev.unmatched is not None:
        examples = ({"where": f"rows {some(ev.unmatched)}"},)
        yield Hit("rows are in no prepared row", len(ev.unmatched), ev.read, examples)


@rule(
    "another-mode",
    "info",
    why="The rows are what inference shows in another mode of the template than its default: exact there alone.",
    fix="Set the same switch at inference; or render the rows as inference does without it.",
)
def another_mode(ev: Evidence) -> Iterator[Hit]:
    pieces = [(s, p.mode) for s in ev.seen for p in s.pieces]
    for mode in sorted({mode for _, mode in pieces if mode}):
        at = [(s.where, s.ids[:16]) for s, m in pieces if m == mode]
        yield from located(ev, f"documents are right for inference with {mode}", at, len(pieces))


@rule(
    "audited-for-x-alone",
    "info",
    why="The encoder refuses these rows, so nobody can say which tokens a model has to produce in them; what they "
    "train of x is a finding all the same.",
    fix="Mend the rows, or leave them out; their refusals say how.",
)
def audited_for_x_alone(ev: Evidence) -> Iterator[Hit]:
    pieces = [(s, p) for s in ev.seen for p in s.pieces]
    at = [(s.where, s.ids[:16]) for s, p in pieces if not p.proven]
    yield from located(ev, "documents are of refused rows", at, len(pieces))


rule(
    "encoder-notes",
    "info",
    why="The encoder mended or decided something on the way, and says so on each sequence.",
    fix="Nothing, if it is meant.",
)(lambda ev: _noted(ev, misspelt=False))
rule(
    "key-misspelt", "warning",
    why="Nothing reads the key, which is nearly the name of one that is read: what it asks for isn't done.",
    fix="Rename the key as the finding says, or remove it.",
)(lambda ev: _noted(ev, misspelt=True))  # fmt: skip


def _noted(ev: Evidence, misspelt: bool) -> Iterator[Hit]:
    """A hit for each note of sequences: those that name a likelier key, or all others."""
    by_note: dict[str, list[int]] = defaultdict(list)
    for row, notes in ev.encoded.notes():
        for note in dict.fromkeys(re.sub(r"\[\d+\]", "[…]", n) for n in notes):
            if ("did you mean" in note) == misspelt:
                by_note[note].append(row)
    for note, at in by_note.items():
        examples = ({"where": f"rows {some(list(dict.fromkeys(at)))}"},)
        yield Hit(f"sequences: {note}", len(at), len(ev.encoded), examples)


@rule(
    "end-does-not-stop",
    "warning",
    why="Generation stops at the model's eos tokens, and the token that ends a turn in training is none of "
    "them: the model would write on past its answer.",
    fix="Add the token to generation_config.eos_token_id.",
)
def end_does_not_stop(ev: Evidence) -> Iterator[Hit]:
    if not ev.stop_ids:
        return
    total, deaf = 0, []
    for columns in ev.encoded.segments():
        at = columns.of_kind("end_of_turn")
        known = np.append(0, np.cumsum(np.isin(columns.ids, list(ev.stop_ids))))
        silent = at & (known[columns.stop] == known[columns.start])
        total += int(at.sum())
        where = zip(
            *(c[silent].tolist() for c in (columns.sequence, columns.start, columns.stop)), strict=True
        )
        deaf += [(ev.encoded.name(n), columns.ids[start:stop]) for n, start, stop in where]
    yield from located(ev, "turns end in a token at which generation doesn't stop", deaf, total)


@rule(
    "duplicates",
    "info",
    why="The same x and y several times weigh several times.",
    fix="Remove repeated rows, unless they are meant.",
)
def duplicates(ev: Evidence) -> Iterator[Hit]:
    if ev.repeats is None:
        return
    again = ev.repeats.duplicates()
    examples = tuple({"where": f"{ev.repeats.what} {some(g)}"} for g in again[:EXAMPLES])
    count = sum(len(g) - 1 for g in again)
    yield Hit("rows repeat another row", count, len(ev.repeats), examples)


@rule(
    "conflicting-answers",
    "warning",
    why="One x with different y: the best that the model can learn is a mixture of them.",
    fix="Keep one answer for each x, unless several are meant.",
)
def conflicting_answers(ev: Evidence) -> Iterator[Hit]:
    if ev.repeats is None:
        return
    torn = ev.repeats.conflicts()
    examples = tuple(
        {
            "where": f"{ev.repeats.what} {some(list(answers))}",
            "text": " | ".join(ev.text(y) for y in list(answers.values())[:EXAMPLES]),
        }
        for _, answers in torn[:EXAMPLES]
    )
    count = sum(rows for rows, _ in torn)
    yield Hit("rows have the same x and another y", count, len(ev.repeats), examples)


@rule(
    "length-outliers",
    "info",
    why="A few rows are far longer than the rest: they set the memory of a run and dominate its batches.",
    fix="Look at them; set max_length on purpose.",
)
def length_outliers(ev: Evidence) -> Iterator[Hit]:
    lengths = ev.encoded.length
    if len(lengths) < 20:
        return
    low, high = np.quantile(lengths, [0.25, 0.75])
    limit = high + 6 * max(high - low, 8)
    far = _longer(ev, limit)
    message = f"sequences are far longer than the rest (median {int(np.median(lengths)):,} tokens)"
    yield from located(ev, message, far, len(lengths))


@rule(
    "longer-than-the-model",
    "warning",
    why="Positions beyond those that the model was made for give unreliable numbers.",
    fix="Set max_length, or split the rows.",
)
def longer_than_the_model(ev: Evidence) -> Iterator[Hit]:
    limit = ev.context_length
    if limit is None:
        return
    message = f"sequences are longer than the model's {limit:,} positions"
    yield from located(ev, message, _longer(ev, limit), len(ev.encoded))


def _longer(ev: Evidence, limit: float) -> list[tuple[str, str]]:
    """Where sequences of more tokens than that are, and of how many."""
    at = np.flatnonzero(ev.encoded.length > limit).tolist()
    return [(ev.encoded.name(n), f"{ev.encoded.length[n]:,} tokens") for n in at]


@rule(
    "weights-out-of-range",
    "warning",
    why="A weight above 1 multiplies a token's gradient: a few such tokens can dominate a step.",
    fix="Keep weights in [0, 1]; repeat a row to count it twice.",
)
def weights_out_of_range(ev: Evidence) -> Iterator[Hit]:
    above, most = 0, 0.0
    for s in ev.encoded.bare_ones():
        above += int((s.weights > 1).sum())
        most = max(most, float(s.weights.max()))
    if above:
        examples = ({"where": "the largest", "text": f"{most:g}"},)
        yield Hit("tokens have a weight above 1", above, int(ev.encoded.length.sum()), examples)


@rule(
    "joint-above-marginal",
    "error",
    why="[x, y] begins with x, so log Pr([x, y]) ≤ log Pr(x), always: such a pair of scores is wrong.",
    fix="Score both with the same tokenisation and model, as sums over tokens.",
)
def joint_above_marginal(ev: Evidence) -> Iterator[Hit]:
    wrong = [
        (f"row {i}", f"log Pr([x,y]) = {joint:g} > log Pr(x) = {x:g}")
        for i, joint, x in ev.scored
        if joint > x + 1e-4
    ]
    yield from located(ev, "rows have a joint above its marginal", wrong, len(ev.scored))


def _quarantined(ev: Evidence, message: str, *reasons: str) -> Iterator[Hit]:
    rows = [(r.where, _what_and_fix(r)) for r in ev.rejected if r.reason in reasons]
    yield from located(ev, message, rows, len(ev.rejected) + ev.accepted)


def _what_and_fix(rejected: Rejected) -> str:
    """What is wrong and the fix, without the place that the message begins with."""
    what, *further = rejected.message.removeprefix(f"{rejected.where}: ").split("\n")
    fix = next((line.strip() for line in further if line.startswith("  fix: ")), "")
    return f"{what} ({fix})" if fix else what
