"""The log of a training run as charts: ours, or that of any transformers trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .page import Page
from .parts import Curve

NATS = "Nats per token, lower is more probable"
# Logged name → (curve, chart). What isn't listed here has no curve: learning rates and run times are no news.
LOGGED = {
    "loss": ("loss that is trained", NATS),
    "eval_conditional_nats": ("conditional, log Pr(y|x), held out", NATS),
    "eval_marginal_nats": ("marginal, log Pr(x), held out", NATS),
    "ygx_conditional": ("conditional, watched examples", NATS),
    "ygx_marginal": ("marginal, watched examples", NATS),
    "ygx_end_of_turn": ("end of turn, watched examples", NATS),
    **{
        f"{when}{name}": (f"{label}{where}", chart)
        for when, where in (("", ""), ("eval_", ", held out"))
        for name, label, chart in (
            ("chosen_nats", "good replies", NATS),
            ("rejected_nats", "bad replies", NATS),
            ("margin", "margin", "Margin of the better reply, nats"),
            ("accuracy", "pairs in order", "Share of pairs in which the better reply gained more"),
            ("kl", "KL", "KL divergence from the reference, nats per token"),
        )
    },
    "grad_norm": ("norm of the gradient", "Norm of the gradient"),
    "y_tokens_per_second": ("tokens of y", "Tokens per second"),
    "sharing": ("tokens / distinct tokens", "Sharing"),
    "trained_share": ("trained share", "Share of tokens that is trained"),
    "ygx_trained_share": ("trained share, probed", "Share of tokens that is trained"),
    "peak_memory_mib": ("peak memory", "Peak memory, MiB"),
}


def curves(
    history: Iterable[Mapping[str, Any]], *, suffix: str = "", names: Iterable[str] = LOGGED
) -> list[Curve]:
    """A curve for each of `names` that `history` (a trainer's `state.log_history`) has values of."""
    entries = [entry for entry in history if "step" in entry]
    found = []
    for name in names:
        label, chart = LOGGED[name]
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            # A value that is logged at some steps alone, such as an evaluation, has its own x.
            steps, values = zip(*points, strict=True)
            found.append(Curve(label + suffix, steps, values, chart=chart))
    return found


def run_page(history: Iterable[Mapping[str, Any]], *, title: str = "Training run", **parts: Any) -> Page:
    """The page of a run, from `trainer.state.log_history` of any transformers trainer.

    parts: further content of the Page, such as `summary` or `rows`.
    """
    return Page(title=title, curves=curves(history), **parts)
