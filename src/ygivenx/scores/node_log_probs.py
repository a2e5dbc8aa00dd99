"""The log-probability and the rank of every node of a forest, streamed: memory is bounded by a chunk."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import ModelError
from ..forest import Forest, Ints
from ..head.selective import Ranked, log_probs
from ..models.model import head_of, stream_hidden

CHUNK = 4096  # nodes; without gradients little is held per node, and few chunks read their paths seldom

Float64s = npt.NDArray[np.float64]


def node_log_probs(model: nn.Module, forest: Forest, **options: Any) -> Float64s:
    """log Pr(token | path) of every node, float64 [N]; NaN at roots, which have no context. No gradients."""
    return node_values(model, forest, ranks=False, **options)[0]


@torch.no_grad()
def node_values(
    model: nn.Module,
    forest: Forest,
    wanted: bool | npt.NDArray[np.bool_] = True,
    *,
    chunk: int = CHUNK,
    route: str = "auto",
    ranks: bool = True,
) -> tuple[Float64s, Ints]:
    """(log Pr(token | path) float64 [N], its rank int64 [N], 0 = most probable) of the wanted nodes.

    NaN and −1 elsewhere, and at roots, which have no context; −1 everywhere without `ranks`. The forest is
    streamed, `chunk` nodes at a time, with the keys and values of the current path: memory is bounded by the
    chunk. route: see `hidden_states`. Raises ModelError where the model itself gives NaN.
    """
    edges = forest.edges(wanted)
    log_p = np.full(len(forest), np.nan)
    rank = np.full(len(forest), -1)
    head = head_of(model)
    for part, hidden in stream_hidden(model, forest, chunk=chunk, route=route, needed=np.unique(edges.rows)):
        at, local = edges.leaving(part)
        rows, targets = (torch.from_numpy(a).to(hidden.device) for a in (local, edges.targets[at]))
        ask: Any = partial(
            log_probs,
            hidden,
            head.weight,
            rows,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
        )
        found = ask(ranks=True) if ranks else Ranked(ask(), torch.full_like(rows, -1))
        log_p[edges.nodes[at]] = found.log_p.double().cpu().numpy()
        rank[edges.nodes[at]] = found.rank.cpu().numpy()
    _refuse_nan(model, log_p[edges.nodes])
    return log_p, rank


def _refuse_nan(model: nn.Module, log_p: Float64s) -> None:
    """Sums leave NaN out, as what has no value: one that the model computed must not pass for it."""
    bad = int(np.isnan(log_p).sum())
    if bad:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise ModelError(
            f"the model gives NaN for {bad:,} of {len(log_p):,} tokens",
            where=type(model).__name__,
            why=f"its weights hold NaN or infinity, or its values overflow in {dtype}",
            fix="look at its weights; where they are finite, compute in float32 (or in bfloat16, which has its range)",
        )
