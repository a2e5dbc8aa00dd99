"""Rules about which tokens are trained, by a batch's labels or a step's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..evidence import SILENT, UNKNOWN, Evidence, ObservedRow
from .base import Hit, rule
from .shared import (
    after_end,
    collect,
    expected_y,
    located,
    misplaced,
    of_kind,
    of_weight_zero,
    only_last_reply,
    parts_of,
    share_equal,
    supplied,
    tokens,
)

# Kinds of the assistant's own text: where it is no output, the prompt supplies it.
OWN = ("answer", "tool_call")
NOT_A_ROLE = ("template", "bos", "tool", "reasoning", "end_of_turn", *OWN, UNKNOWN, "")


@rule(
    "loss-on-x",
    "error",
    why="Fine-tuning minimises −log Pr(y|x). Loss on x teaches the model to write its user's questions, and "
    "takes gradient from the answers.",
    fix="Mask what the model doesn't produce: assistant_only_loss / completion_only_loss, or labels −100 on "
    "x.",
)
def loss_on_x(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(ev, "tokens of the input are trained", lambda s: supplied(s) & ~of_kind(s, *NOT_A_ROLE))


@rule(
    "tool-result-trained",
    "error",
    why="At inference the tool writes its result. A model trained on results learns to invent them.",
    fix="Give tool messages no loss.",
)
def tool_result_trained(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(ev, "tokens of tool results are trained", lambda s: supplied(s) & of_kind(s, "tool"))


@rule(
    "history-reasoning-trained",
    "error",
    why="The template removes earlier reasoning at inference: the model would learn to produce it where it "
    "is never requested to, in a context that never occurs.",
    fix="Train each turn in the context that inference shows (split mode), or drop the reasoning of the "
    "history.",
)
def history_reasoning(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(
        ev,
        "tokens of earlier reasoning are trained",
        lambda s: supplied(s) & of_kind(s, "reasoning") & (s.role != SILENT),
    )


@rule(
    "prompt-header-trained",
    "warning",
    why="Only prompts hold these tokens (a role's header, a default system prompt, a prefilled <think>): the model "
    "never has to write them, and their loss is counted in the mean.",
    fix="Train from behind the generation prompt on; labels before it are -100.",
)
def prompt_header_trained(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(
        ev,
        "tokens that the prompt supplies are trained",
        lambda s: supplied(s) & of_kind(s, "template", "bos", *OWN) & ~after_end(s) & (s.role == 0),
    )


@rule(
    "after-end-trained",
    "info",
    why="What follows the token that ends a turn (a newline, say) is never generated: decoding has stopped.",
    fix="Let the end-of-turn token be the last one that is trained.",
)
def after_end_trained(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(
        ev,
        "tokens after the end of a turn are trained",
        lambda s: supplied(s) & of_kind(s, "template") & after_end(s),
    )


@rule(
    "y-untrained",
    "error",
    why="Tokens that the model has to produce get no gradient: that part of y is not learned.",
    fix="Train the whole reply; check response templates and truncation.",
)
def y_untrained(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(
        ev,
        "tokens of y are not trained",
        lambda s: _missed(s) & ~of_kind(s, "end_of_turn"),
        of=lambda s: expected_y(s) & ~of_kind(s, "end_of_turn"),
    )


@rule(
    "end-untrained",
    "error",
    why="The token that ends a turn gets no gradient, so the model isn't taught to stop.",
    fix="Train the end-of-turn token; never set labels to -100 by `== pad_token_id` where pad equals it.",
)
def end_untrained(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(
        ev,
        "end-of-turn tokens are not trained",
        lambda s: _missed(s) & of_kind(s, "end_of_turn"),
        of=lambda s: expected_y(s) & of_kind(s, "end_of_turn"),
    )


def _missed(s: ObservedRow) -> np.ndarray:
    """Tokens that should be trained and aren't, but for a choice of last replies alone, which has its own rule."""
    return np.asarray(expected_y(s) & ~s.trained & ~s.foreign & ~only_last_reply(s), bool)


@rule(
    "only-last-turn",
    "warning",
    why="Of each conversation the last reply alone is trained: exact, but earlier replies cost compute and teach "
    "nothing.",
    fix="Train all replies; or audit with the same policy, train='last', if it is meant.",
)
def only_last_turn(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(ev, "tokens of earlier replies are not trained", only_last_reply, of=expected_y)


@rule(
    "shifted-labels",
    "error",
    why="The trained target isn't the next token of the text: the model learns to copy or to skip.",
    fix="Shift exactly once: transformers' models shift labels themselves, a loss of your own has to. Where the "
    "targets are one token, mask with the −100 that the loss ignores.",
)
def shifted_labels(ev: Evidence) -> Iterator[Hit]:
    wrong = collect(ev, misplaced, of=lambda s: s.trained & (s.ids >= 0))
    if wrong.count:
        targets = np.concatenate([s.target[misplaced(s)] for s in ev.seen])
        common = int(np.bincount(targets).argmax())
        shares = {
            "the input token itself": share_equal(ev.seen, 1),
            "two ahead": share_equal(ev.seen, -1),
            f"the one token {ev.text([common])!r}": float((targets == common).mean()),
        }
        name, share = max(shares.items(), key=lambda item: item[1])
        if share > 0.5:
            wrong.examples = ({"where": f"{share:.0%} of them", "text": f"are {name}"}, *wrong.examples)
    yield wrong.hit("targets are not the next token")


@rule(
    "padding-trained",
    "error",
    why="Padding is no text; training on it teaches the model to repeat the pad token and inflates the "
    "denominator.",
    fix="Set labels to −100 where attention_mask is 0.",
)
def padding_trained(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(ev, "padding tokens are trained", lambda s: s.trained & s.padding)


@rule(
    "nothing-trained",
    "error",
    why="A row without a trained token costs a forward and backward pass and teaches nothing; a batch of "
    "them is a loss of 0, or NaN.",
    fix="Check the response template or mask, and max_length; leave such rows out by name.",
)
def nothing_trained(ev: Evidence) -> Iterator[Hit]:
    units = [(s, part) for s in ev.seen for part in parts_of(s)]
    empty = [(s.where, s.ids[part][:40]) for s, part in units if not (s.trained | s.foreign)[part].any()]
    yield from located(ev, "rows have no trained token", empty, len(units), "warning", "error")


@rule(
    "not-finite",
    "error",
    why="A NaN or infinite gradient destroys the weights in one update; trainers log such a loss as 0.0.",
    fix="Leave out rows without a trained token, and divide by max(1, tokens).",
)
def not_finite(ev: Evidence) -> Iterator[Hit]:
    yield from tokens(
        ev, "gradients are not finite", lambda s: ~np.isfinite(s.weight), of=lambda s: s.weight != 0
    )


@rule(
    "weights-ignored",
    "error",
    why="The rows ask for weights per token or message, and the trainer doesn't apply them.",
    fix="Use a trainer that carries float weights (yx.Trainer), or a loss that reads them.",
)
def weights_ignored(ev: Evidence) -> Iterator[Hit]:
    silent = "tokens are trained that their rows give the weight 0"
    yield from tokens(ev, silent, of_weight_zero)
    at = ev.tokens.trained & (ev.tokens.expected > 0) if ev.seen else np.zeros(0, bool)
    if not at.any() or np.ptp(ev.tokens.expected[at]) < 1e-3:
        return
    if ev.probe is not None and ev.probe.weighting == "probability":
        return
    requested, given = [], []
    for s in ev.seen:
        at = s.trained & (s.expected > 0)
        unit = np.median(s.weight[at] / s.expected[at]) if at.any() else 1.0
        requested += (s.expected[at]).tolist()
        given += (s.weight[at] / unit).tolist()
    off = np.abs(np.array(given) / np.array(requested) - 1) > 0.05
    if off.any():
        yield Hit(
            "tokens are trained with another weight than their rows ask for",
            int(off.sum()),
            len(off),
        )


@rule(
    "labels-ignored",
    "error",
    why="The batch's labels say one thing and the gradient another: the loss doesn't use the mask it is "
    "given.",
    fix="Pass labels to the loss, with ignore_index −100; check fused kernels and overridden compute_loss.",
)
def labels_ignored(ev: Evidence) -> Iterator[Hit]:
    labels = {(s.micro_batch, s.row): s for s in ev.labels}
    pairs = [(s, labels.get((s.micro_batch, s.row))) for s in ev.steps]
    kept = [
        (s, by_label) for s, by_label in pairs if by_label is not None and len(by_label.ids) == len(s.ids)
    ]
    differ = [(s.trained != by_label.trained) & ~s.foreign for s, by_label in kept]
    found = collect(ev, lambda _: np.concatenate(differ), seen=[s for s, _ in kept])
    if found.count:
        yield found.hit("predictions are trained against their labels' mask")
