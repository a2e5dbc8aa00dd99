"""Rules about what the loss is: what it is divided by, and what else is in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from ..evidence import Denominator, Evidence
from .base import Hit, rule
from .shared import EXAMPLES, spread_of


@rule(
    "denominator-per-micro-batch",
    "error",
    why="Each micro-batch is divided by its own token count: a token of a short micro-batch counts for "
    "more, and the result depends on how the batch was cut.",
    fix="Divide by the tokens of the whole step (num_items_in_batch), as yx.Trainer and recent trainers do.",
)
def denominator_per_micro_batch(ev: Evidence) -> Iterator[Hit]:
    for rank in sorted({d.rank for d in ev.denominators}):
        own = [d for d in ev.denominators if d.rank == rank]
        spread = spread_of(ev, [d.weight for d in own])
        # Weights of the user's own (per sequence, focal, per sample) differ between micro-batches, too: only where
        # all tokens of a micro-batch weigh alike, and each adds up to the same, was it divided by its count.
        if spread > 1.01 and _divided(own):
            yield Hit(
                f"a trained token weighs up to {spread:.3g} times as much in one micro-batch as in another",
                len(own),
                examples=tuple(
                    {
                        "where": f"micro-batch {d.micro_batch}",
                        "text": f"{d.tokens} tokens, {d.weight:.4g} each",
                    }
                    for d in own[:EXAMPLES]
                ),
            )
            return


def _divided(own: list[Denominator]) -> bool:
    totals = [d.total for d in own]
    return all(d.uniform for d in own) and max(totals) <= 1.02 * min(totals)


@rule(
    "denominator-per-rank",
    "error",
    why="Each rank divides by its own token count before gradients are averaged: tokens count for more on "
    "ranks that have few.",
    fix="Count tokens over all ranks (average_tokens_across_devices=True).",
)
def denominator_per_rank(ev: Evidence) -> Iterator[Hit]:
    by_rank = defaultdict(list)
    for d in ev.denominators:
        by_rank[d.rank].append(d)
    means = {rank: float(np.median([d.weight for d in own])) for rank, own in by_rank.items()}
    spread = spread_of(ev, list(means.values()))
    if spread > 1.01 and all(d.uniform for d in ev.denominators):
        examples = tuple(
            {"where": f"rank {r}", "text": f"{w:.4g} a token"} for r, w in list(means.items())[:EXAMPLES]
        )
        yield Hit(
            f"a trained token weighs up to {spread:.3g} times as much on one rank as on another",
            len(means),
            examples=examples,
        )


@rule(
    "evaluation-divides-differently",
    "warning",
    why="The evaluation loss is a mean of batch means, the training loss a mean over tokens: the two curves "
    "aren't the same quantity, and the evaluation depends on its batch size.",
    fix="Evaluate with batch size 1 over equal rows, or with yx.Trainer, which divides both by tokens.",
)
def evaluation_divides_differently(ev: Evidence) -> Iterator[Hit]:
    e = ev.evaluation
    apart = 0.0 if e is None else abs(e.reported - e.by_token)
    if e is not None and apart > 1e-5 * abs(e.by_token):
        yield Hit(
            f"the evaluation loss is {e.reported:.6f}; divided by tokens as in training, {e.by_token:.6f}"
        )


@rule(
    "label-smoothing",
    "info",
    why="The loss is a cross-entropy with smoothed labels: its value isn't −log Pr(y|x).",
    fix="Nothing, if it is meant.",
)
def label_smoothing(ev: Evidence) -> Iterator[Hit]:
    if ev.probe is not None and ev.probe.smoothing > 1e-3:
        yield Hit(f"labels are smoothed by ε = {ev.probe.smoothing:.3g}")


@rule(
    "weights-by-probability",
    "info",
    why="Each token's weight is its own probability (as in dynamic fine-tuning): what the model finds "
    "unlikely is trained little.",
    fix="Nothing, if it is meant.",
)
def weights_by_probability(ev: Evidence) -> Iterator[Hit]:
    if ev.probe is not None and ev.probe.weighting == "probability":
        yield Hit("weights are proportional to the tokens' probabilities")


@rule(
    "beyond-cross-entropy",
    "info",
    why="Part of the gradient at the head isn't a weighted cross-entropy: z-loss, distillation, an entropy "
    "bonus.",
    fix="Nothing, if it is meant.",
)
def beyond_cross_entropy(ev: Evidence) -> Iterator[Hit]:
    from ..gradients import FOREIGN_TERM

    residuals = [f.residual for b in ev.probe.micro_batches for f in b.found] if ev.probe is not None else []
    odd = [r for r in residuals if r > FOREIGN_TERM]
    if odd:
        yield Hit("rows of the gradient carry another term than cross-entropy", len(odd), len(residuals))
