"""The loss of a forest: −Σ w(v)·log p(v) / W, and nothing for a token without a weight.

Equals `ygivenx.reference.loss`, value and gradients, up to the rounding of the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .choices import Route
from .errors import LossError, ModelError
from .forest import Edges, Forest, Ints
from .head.selective import selective_cross_entropy
from .models.logits import softcap_and_scale
from .models.model import head_of, loss_over
from .models.streaming import ONE_PASS
from .models.wrappers import inside_forward, sharded
from .sequence import Example, RatedExample, Sequence

if TYPE_CHECKING:
    from torch import nn

Batch = Forest | Sequence | Example | Iterable[Any]


@dataclass(frozen=True)
class Loss:
    """What one forward pass over a forest gives.

    value: scalar tensor, differentiable, Σ w·(−log p) / weight_sum, in nats.
    weight_sum: the denominator that `value` was divided by.
    log_p: float32 [E], log Pr(target | its path) per edge, detached; `edges` says which edge is which.
    """

    value: torch.Tensor
    weight_sum: float
    log_p: torch.Tensor
    edges: Edges
    forest: Forest

    def __str__(self) -> str:
        return (
            f"Loss: {float(self.value.detach()):.4f} nats per unit of weight, "
            f"{len(self.edges.rows):,} trained edges of weight {self.weight_sum:g}\n{self.forest}"
        )


def loss(
    model: nn.Module,
    batch: Batch,
    *,
    denominator: float | None = None,
    route: Route = "auto",
    chunk: int | None = None,
) -> Loss:
    """−Σ w(v)·log Pr(v | path to v) / W over the trained edges of a forest.

    `batch` is a Forest, or sequences and examples that become one. `denominator` is W: by default the sum of
    the batch's own weights; give the sum over the whole optimiser step when this batch is only a part of it.
    route, chunk: see `hidden_states`.

    A model in DistributedDataParallel or FullyShardedDataParallel, or after fully_shard, is run through that wrapper,
    so its ranks average their gradients as ever. For the loss of one process `denominator` is then the weight of the
    step on all ranks, divided by the number of ranks: that undoes the average.

    Raises LossError if the batch has no weight at all and no denominator is given: 0/0 isn't a loss.
    """
    forest = as_forest(batch)
    if sharded(model):
        if chunk is not None:
            raise ModelError(
                "a forest in chunks can't be computed with sharded weights",
                why="ranks have to make equally many forward passes, and their forests have different lengths",
                fix="leave chunk out, or use DistributedDataParallel",
            )
        chunk = ONE_PASS
    return inside_forward(model, lambda inner: _loss(inner, forest, denominator, route, chunk))


def _loss(
    model: nn.Module, forest: Forest, denominator: float | None, route: Route, chunk: int | None
) -> Loss:
    edges = forest.edges()
    weight_sum = float(edges.weights.sum(dtype=np.float64)) if denominator is None else float(denominator)
    if not weight_sum > 0:
        raise LossError(
            "no token of this batch has a weight",
            why="the loss is a weighted mean, and the weights add up to 0",
            fix="leave such rows out, or pass denominator= with the weight of the whole step",
        )
    # Divided before, not after: gradients come out of the head finished, with no further pass over the largest.
    shares = (edges.weights / np.float64(weight_sum)).astype(np.float32)

    # By the first row of each part: which edges leave its rows, and their log p. A dict, as a part may come twice.
    by_part: dict[int, tuple[Ints, torch.Tensor]] = {}

    def score(rows: Ints, hidden: torch.Tensor) -> torch.Tensor:
        head = head_of(model)  # here: what a parametrization makes of its weight belongs to one graph
        these, at = edges.leaving(rows)
        local, targets, weights = (
            torch.from_numpy(v).to(hidden.device) for v in (at, edges.targets[these], shares[these])
        )
        log_p, share = selective_cross_entropy(
            hidden,
            head.weight,
            local,
            targets,
            weights,
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
        )
        by_part[int(rows[0]) if len(rows) else 0] = these, log_p
        return share

    # Measured in eval mode, for which some models (RWKV) change their weights: not between forward and backward.
    softcap_and_scale(model)
    value = loss_over(model, forest, score, route=route, chunk=chunk, needed=np.unique(edges.rows))
    which, log_p = zip(*by_part.values(), strict=True)
    in_order = torch.from_numpy(np.argsort(np.concatenate(which)))
    return Loss(value, weight_sum, torch.cat(log_p)[in_order.to(value.device)], edges, forest)


def as_forest(batch: Batch) -> Forest:
    """A Forest as it is; a sequence, an example or an iterable of them as a new one."""
    if isinstance(batch, Forest):
        return batch
    items = [batch] if isinstance(batch, Sequence | Example | RatedExample) else batch
    if isinstance(items, Mapping | str) or not isinstance(items, Iterable):
        raise LossError(
            f"a {type(batch).__name__} is no batch", where="batch",
            why="a Forest, an Example, a Sequence or several of them have a loss",
            fix="Encoder(tokenizer)(row) encodes a row; yx.log_probs takes Targets",
        )  # fmt: skip
    items = list(items)
    if any(isinstance(item, RatedExample) for item in items):
        raise LossError(
            "rated replies in a loss that raises the probability of all of them",
            fix="yx.log_probs with a function of ygivenx.objectives, or yx.PreferenceTrainer",
        )
    return Forest.of(items)
