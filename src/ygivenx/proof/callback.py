"""A callback for any transformers trainer: what a run does to y, and to x, measured apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ..errors import ConfigError
from ..forest import Forest
from ..scores.node_log_probs import node_log_probs
from ..sequence import Example, Sequence
from .probing import Probe, probe
from .wrapping import unwrap

# A run behaves as if x were trained once x has improved by this share of what y has, and by more than noise.
# Measured (benchmarks/seed-question.md): loss on y moves x by a few percent of that, or makes it worse.
SHARE_OF_Y, NOISE = 0.5, 0.05


class XTrainedWarning(UserWarning):
    """The run improves the model's prediction of x as training on x would."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """At one step, over the watched sequences, in nats per token (lower is better).

    conditional: of y given x, end of turn included. marginal: of x. end_of_turn: of the tokens that end a turn
    alone, NaN without any. trained_share: of the first step's tokens, by its gradient; NaN if not probed.
    """

    step: int
    conditional: float
    marginal: float
    end_of_turn: float
    trained_share: float


class Watch(TrainerCallback):
    """Measure the conditional and the marginal of some examples every `every` steps of any trainer.

    examples: Examples or Sequences with segments (a few dozen suffice; each measurement is a forward pass over
    them). The first step is probed for its trained share, unless `probe_first_step` is False;
    where that fails, a warning says so.
    `history` collects Measurements; the same numbers enter the trainer's log history as `ygx_…`.
    Warns (XTrainedWarning, once) when x improves like y.

    Raises ConfigError if the examples have no tokens of x or none of y.
    """

    def __init__(
        self, examples: Iterable[Example | Sequence], *, every: int = 50, probe_first_step: bool = True
    ) -> None:
        self.sequences = [s for e in examples for s in ([e] if isinstance(e, Sequence) else e)]
        self.forest = Forest.of(self.sequences)
        self.every = every
        self.history: list[Measurement] = []
        self._masks = _masks(self.sequences)
        self._probe: Probe | None = None
        self._probe_due = probe_first_step
        self._trained_share = float("nan")
        self._warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state, kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._probe_due:
            self._probe_due = False
            with _warn_if_it_fails():
                self._probe = probe(kwargs["model"]).__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        probed, self._probe = self._probe, None
        if probed is not None:
            with _warn_if_it_fails():
                probed.__exit__(None, None, None)
                tokens = [t for t in probed.tokens() if t.attended]
                self._trained_share = sum(t.trained for t in tokens) / max(len(tokens), 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.history[-1].step != state.global_step:
            self._measure(state, kwargs["model"])

    def _measure(self, state: Any, model: Any) -> None:
        model = unwrap(model)
        training = model.training
        model.eval()
        try:
            log_p = node_log_probs(model, self.forest)
        finally:
            model.train(training)
        values = -np.concatenate([log_p[path] for path in self.forest.paths])
        y, x, end = (float(np.nanmean(values[m])) if m.any() else float("nan") for m in self._masks)
        now = Measurement(state.global_step, y, x, end, self._trained_share)
        self.history.append(now)
        state.log_history.append(
            {f"ygx_{k}": v for k, v in asdict(now).items() if k != "step"} | {"step": now.step}
        )
        self._judge(now)

    def _judge(self, now: Measurement) -> None:
        first = self.history[0]
        y, x = first.conditional - now.conditional, first.marginal - now.marginal
        if self._warned or x < NOISE or x < SHARE_OF_Y * y:
            return
        self._warned = True
        warnings.warn(
            f"step {now.step}: x improved by {x:.3f} nats/token and y by {y:.3f}, as if x were trained; the first "
            f"step trained {self._trained_share:.0%} of its tokens. yx.audit(trainer=...) says which.",
            XTrainedWarning,
            stacklevel=2,
        )


@contextmanager
def _warn_if_it_fails() -> Iterator[None]:
    """A probe that fails is a warning: the run that it looks at goes on."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"the first step could not be probed: {error}", UserWarning, stacklevel=2)


def _masks(sequences: list[Sequence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool over all tokens of all sequences: y, x, end of turn."""
    y = np.concatenate([s.output for s in sequences])
    end = np.concatenate([s.of_kind("end_of_turn") for s in sequences]) & y
    if y.all() or not y.any():
        raise ConfigError(
            "the watched examples have no tokens of x, or none of y",
            why="the callback compares the two",
            fix="give Examples of an Encoder, whose segments say which is which",
        )
    return y, ~y, end
