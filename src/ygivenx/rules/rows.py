"""Rules about the rows themselves, before any training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from ..evidence import Evidence
from .base import Hit, rule
from .shared import EXAMPLES, by_x, some


@rule(
    "rows-quarantined",
    "warning",
    why="The encoder can't train these rows as inference would show them; nothing of them is trained.",
    fix="Read the messages: each says what to do.",
)
def rows_quarantined(ev: Evidence) -> Iterator[Hit]:
    total = len(ev.rejected) + len(ev.examples)
    by_reason = defaultdict(list)
    for r in ev.rejected:
        by_reason[r.reason].append(r)
    for reason, rows in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        examples = tuple({"where": r.where, "text": r.message} for r in rows[:EXAMPLES])
        yield Hit(f"rows are quarantined: {reason}", len(rows), len(rows) / total, examples)


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
    ends = [
        (i, s.ids[g.start : g.stop])
        for i, s in enumerate(ev.sequences)
        for g in s.segments
        if g.kind == "end_of_turn"
    ]
    deaf = [(i, ids) for i, ids in ends if not ev.stop_ids & set(ids.tolist())]
    if deaf:
        examples = tuple({"where": f"example {i}", "text": ev.text(ids)} for i, ids in deaf[:EXAMPLES])
        yield Hit(
            "turns end in a token at which generation doesn't stop",
            len(deaf),
            len(deaf) / len(ends),
            examples,
        )


@rule(
    "duplicates",
    "info",
    why="The same x and y several times weigh several times.",
    fix="Remove repeated rows, unless they are meant.",
)
def duplicates(ev: Evidence) -> Iterator[Hit]:
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, example in enumerate(ev.examples):
        groups[tuple(t for s in example.sequences for t in s.ids.tolist())].append(i)
    again = [g for g in groups.values() if len(g) > 1]
    count = sum(len(g) - 1 for g in again)
    if count:
        examples = tuple({"where": f"examples {some(g)}"} for g in again[:EXAMPLES])
        yield Hit("rows repeat another row", count, count / len(ev.examples), examples)


@rule(
    "conflicting-answers",
    "warning",
    why="One x with different y: the best that the model can learn is a mixture of them.",
    fix="Keep one answer for each x, unless several are meant.",
)
def conflicting_answers(ev: Evidence) -> Iterator[Hit]:
    torn = [answers for answers in by_x(ev).values() if len(answers) > 1]
    count = sum(len(rows) for answers in torn for rows in answers.values())
    if count:
        examples = tuple(
            {
                "where": f"examples {some([rows[0] for rows in answers.values()])}",
                "text": " | ".join(ev.text(y[:24]) for y in list(answers)[:EXAMPLES]),
            }
            for answers in torn[:EXAMPLES]
        )
        yield Hit("rows have the same x and another y", count, count / len(ev.examples), examples)


@rule(
    "length-outliers",
    "info",
    why="A few rows are far longer than the rest: they set the memory of a run and dominate its batches.",
    fix="Look at them; set max_length on purpose.",
)
def length_outliers(ev: Evidence) -> Iterator[Hit]:
    lengths = np.array([len(s) for s in ev.sequences])
    if len(lengths) < 20:
        return
    low, high = np.quantile(lengths, [0.25, 0.75])
    far = np.flatnonzero(lengths > high + 6 * max(high - low, 8))
    if len(far):
        examples = tuple({"where": f"sequence {i}", "text": f"{lengths[i]:,} tokens"} for i in far[:EXAMPLES])
        message = f"sequences are far longer than the rest (median {int(np.median(lengths)):,} tokens)"
        yield Hit(message, len(far), len(far) / len(lengths), examples)


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
    long = [(i, len(s)) for i, s in enumerate(ev.sequences) if len(s) > limit]
    if long:
        examples = tuple({"where": f"sequence {i}", "text": f"{n:,} tokens"} for i, n in long[:EXAMPLES])
        message = f"sequences are longer than the model's {limit:,} positions"
        yield Hit(message, len(long), len(long) / len(ev.sequences), examples)


@rule(
    "weights-out-of-range",
    "warning",
    why="A weight above 1 multiplies a token's gradient: a few such tokens can dominate a step.",
    fix="Keep weights in [0, 1]; repeat a row to count it twice.",
)
def weights_out_of_range(ev: Evidence) -> Iterator[Hit]:
    weights = np.concatenate([s.weights for s in ev.sequences]) if ev.sequences else np.zeros(0)
    above = weights > 1
    if above.any():
        message = f"tokens have a weight above 1, up to {weights.max():g}"
        yield Hit(message, int(above.sum()), float(above.mean()))


@rule(
    "joint-above-marginal",
    "error",
    why="[x, y] begins with x, so log Pr([x, y]) ≤ log Pr(x), always: such a pair of scores is wrong.",
    fix="Score both with the same tokenisation and model, as sums over tokens.",
)
def joint_above_marginal(ev: Evidence) -> Iterator[Hit]:
    scored = [
        (i, float(r["log_p_xy"]), float(r["log_p_x"]))
        for i, r in enumerate(ev.rows)
        if isinstance(r, Mapping) and {"log_p_xy", "log_p_x"} <= r.keys()
    ]
    wrong = [(i, joint, x) for i, joint, x in scored if joint > x + 1e-4]
    if wrong:
        examples = tuple(
            {"where": f"row {i}", "text": f"log Pr([x,y]) = {joint:g} > log Pr(x) = {x:g}"}
            for i, joint, x in wrong[:EXAMPLES]
        )
        yield Hit("rows have a joint above its marginal", len(wrong), len(wrong) / len(scored), examples)
