"""log Pr of the targets of many sequences, differentiable, from one forest: what every objective is made of.

Sequences that begin alike share their tokens: a prompt with eight completions is computed once, forward and backward.
Equals `ygivenx.reference.log_probs` of each sequence by itself, up to float32 rounding.

    batch = yx.Targets.of([chosen, rejected])           # one forest, built once for policy and reference
    policy = yx.log_probs(model, batch)
    with torch.no_grad():
        reference = yx.log_probs(reference_model, batch)
    gain = policy.sums() - reference.sums()              # log (π / π_ref)(y | x) by sequence
    loss = -logsigmoid(beta * (gain[0] - gain[1]))
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .choices import Route
from .errors import ModelError, RowError
from .forest import Edges, Forest, Ints
from .head.distribution import most_probable
from .head.selective import head_values
from .models.logits import softcap_and_scale
from .models.model import head_of, hidden_states
from .models.wrappers import inside_forward, sharded
from .sequence import Example, RatedExample, Sequence

Item = Sequence | Example | RatedExample
Which = Literal["weighted", "reply", "all"]


@dataclass(frozen=True, eq=False)
class Targets:
    """The M targets of S sequences, and the forest that they share.

    Targets stand in the order of the sequences, and within one in the order of its tokens.
    sequence, position: int64 [M], which token of which sequence each target is. edge: int64 [M], the edge of
    `edges` that predicts it; sequences that agree up to a target share its edge. weight: float32 [M], as the
    sequence itself has it (a Forest adds up the weights of all sequences).
    """

    forest: Forest
    edges: Edges
    sequence: Ints
    position: Ints
    edge: Ints
    weight: npt.NDArray[np.float32]

    @classmethod
    def of(cls, sequences: Iterable[Item], which: Which = "weighted") -> Targets:
        """The targets with a weight, those that are part of a reply (trained or not), or all that have a context.

        Raises RowError where a sequence has none of them: its sum would be an empty one, which is no log-probability.
        """
        flat = [s for item in sequences for s in ((item,) if isinstance(item, Sequence) else item.sequences)]
        positions = [_chosen(s, which) for s in flat]
        for number, (s, chosen) in enumerate(zip(flat, positions, strict=True)):
            if not len(chosen):
                raise RowError(
                    f"none of its {len(s)} tokens is a target ({which})", reason="nothing_trained",
                    where=f"sequence {number}", fix="leave it out, or ask for which='all'",
                )  # fmt: skip
        forest = Forest.of(flat)
        # Sequences that share a target share its node: one edge is computed, and `edge_of` hands its value to each of
        # them.
        nodes = _joined([path[p] for path, p in zip(forest.paths, positions, strict=True)])
        is_target = np.zeros(len(forest), bool)
        is_target[nodes] = True
        edges = forest.edges(is_target)
        edge_of = np.full(len(forest), -1)
        edge_of[edges.nodes] = np.arange(len(edges.nodes))
        sequence = np.repeat(np.arange(len(flat)), [len(p) for p in positions])
        weight = np.concatenate(
            [np.zeros(0, np.float32), *(s.weights[p] for s, p in zip(flat, positions, strict=True))]
        )
        return cls(forest, edges, sequence, _joined(positions), edge_of[nodes], weight)

    @cached_property
    def lengths(self) -> Ints:
        """How many targets each sequence has, int64 [S]."""
        return np.bincount(self.sequence, minlength=len(self.forest.paths))

    def __len__(self) -> int:
        return len(self.sequence)

    def __str__(self) -> str:
        shared = len(self) / max(len(self.edges.rows), 1)
        return (
            f"Targets: {len(self):,} of {len(self.lengths):,} sequences ({shared:.2f}× shared)\n{self.forest}"
        )

    __repr__ = __str__


def _chosen(sequence: Sequence, which: Which) -> Ints:
    masks = {"weighted": sequence.weights != 0, "reply": sequence.output, "all": np.ones(len(sequence), bool)}
    mask = masks[which].copy()
    mask[:1] = False  # the first token has no context to be predicted from
    return np.flatnonzero(mask)


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *parts])


@dataclass(frozen=True, eq=False)
class LogProbs:
    """log_p: float32 [M], log Pr(target | its path) in nats, differentiable; in the order of `targets`.

    On request, without gradients: entropy float32 [M] in nats, of the distribution that predicts the target;
    rank int64 [M], how many tokens are more probable (0 = greedy); top_ids int64 and top_log_p float32 [M, k].
    candidates: float32 [M, k], differentiable, of other tokens that were asked for in the place of each target.
    """

    log_p: Tensor
    targets: Targets
    entropy: Tensor | None = None
    rank: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_p: Tensor | None = None
    candidates: Tensor | None = None

    def sums(self, *, weighted: bool = False) -> Tensor:
        """Σ log p by sequence, float32 [S]: log Pr(y | x). `weighted` multiplies each by its weight."""
        return self.reduce(self.log_p * self.weight if weighted else self.log_p)

    def means(self) -> Tensor:
        """The mean of log p by sequence, float32 [S]."""
        return self.sums() / self.lengths

    def reduce(self, values: Tensor) -> Tensor:
        """Sums by sequence, [S], of any values [M] in the order of the targets."""
        total = values.new_zeros(len(self.targets.lengths), dtype=torch.float64)
        return total.index_add(0, self.sequence, values.double()).to(values.dtype)

    def of(self, sequence: int) -> Tensor:
        """log p of one sequence's targets, float32 [n]."""
        return self.log_p[torch.from_numpy(self.targets.sequence == sequence).to(self.log_p.device)]

    @cached_property
    def sequence(self) -> Tensor:
        """int64 [M], which sequence each target belongs to."""
        return torch.from_numpy(self.targets.sequence).to(self.log_p.device)

    @cached_property
    def weight(self) -> Tensor:
        """float32 [M]."""
        return torch.from_numpy(self.targets.weight).to(self.log_p.device)

    @cached_property
    def lengths(self) -> Tensor:
        """float32 [S], how many targets each sequence has."""
        return torch.from_numpy(self.targets.lengths).to(self.log_p.device, torch.float32)

    def __str__(self) -> str:
        sums = ", ".join(f"{v:.3f}" for v in self.sums().detach()[:4].tolist())
        return f"LogProbs: {len(self.log_p):,} targets, log Pr(y|x) {sums}{', …' if len(self.lengths) > 4 else ''}"

    __repr__ = __str__


def log_probs(
    model: nn.Module,
    batch: Targets | Iterable[Item],
    *,
    entropy: bool = False,
    ranks: bool = False,
    top_k: int = 0,
    candidates: Tensor | None = None,
    adapters: bool = True,
    route: Route = "auto",
    chunk: int | None = None,
) -> LogProbs:
    """log Pr of every target given its path, differentiable in the model's weights.

    batch: `Targets`, or sequences and examples of which the tokens with a weight are the targets.
    entropy, ranks, top_k (at most the size of the vocabulary): more of each distribution, without gradients.
    candidates: int64 [M, k], other tokens in the place of each target, such as a teacher's most probable ones.
    adapters=False leaves out a PEFT model's adapters: its base is then the reference, without a second copy.
    route, chunk: see `hidden_states`; a forest longer than memory is computed in chunks, exact all the same.

    Raises RowError for a sequence without a target, ModelError for a model that can't be computed.
    """
    targets = batch if isinstance(batch, Targets) else Targets.of(batch)
    if chunk is None and sharded(model):  # ranks make equally many forward passes: one each
        chunk = max(1, len(targets.forest))
    with nullcontext() if adapters else _without_adapters(model):
        return inside_forward(
            model, lambda inner: _log_probs(inner, targets, entropy, ranks, top_k, candidates, route, chunk)
        )


def _log_probs(
    model: nn.Module,
    targets: Targets,
    entropy: bool,
    ranks: bool,
    top_k: int,
    candidates: Tensor | None,
    route: Route,
    chunk: int | None,
) -> LogProbs:
    edges = targets.edges
    softcap_and_scale(model)  # before the forward pass, as in `yx.loss`
    hidden = hidden_states(model, targets.forest, route=route, chunk=chunk, needed=np.unique(edges.rows))
    head = head_of(model)
    rows, ids, edge = (
        torch.from_numpy(a).to(hidden.device) for a in (edges.rows, edges.targets, targets.edge)
    )
    count, width = len(rows), 0 if candidates is None else candidates.shape[1]
    top = most_probable(hidden, head, rows, top_k) if top_k else (None, None)
    if candidates is not None:  # further edges out of the same rows: the head computes each row once
        rows = torch.cat((rows, rows[edge].repeat_interleave(width)))
        ids = torch.cat((ids, candidates.to(ids).flatten()))
    values = head_values(hidden, head, rows, ids, ranks=ranks, entropy=entropy)
    log_p = values.log_p
    others = None if candidates is None else log_p[count:].view(len(targets), width)
    more = (None if v is None else v[:count][edge] for v in (values.entropy, values.rank, *top))
    entropy_of, rank, top_ids, top_log_p = more
    return LogProbs(log_p[:count][edge], targets, entropy_of, rank, top_ids, top_log_p, others)


def _without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    disable = getattr(model, "disable_adapter", None)
    if disable is None:
        raise ModelError(
            f"{type(model).__name__} has no adapters to leave out",
            fix="pass adapters=False for a PEFT model, or give the reference model itself",
        )
    context: AbstractContextManager[None] = disable()
    return context
