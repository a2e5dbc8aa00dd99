"""The log-probability and the rank of every node of a forest, streamed: memory is bounded by a chunk.

Equals `ygivenx.reference.log_probs` of each path, up to the rounding of the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..choices import Route
from ..errors import ModelError
from ..forest import Forest, Ints
from ..head.distribution import log_mass, most_probable
from ..head.selective import head_values
from ..models.model import head_of, stream_hidden

CHUNK_NODES = 4096  # nodes; without gradients little is held per node, and few chunks read their paths seldom

Float64s = npt.NDArray[np.float64]


class NodeValues(NamedTuple):
    """By node: log_p float64 [N] in nats, NaN where there is none; rank int64 [N], 0 = most probable, −1 where there is
    none. On request entropy float64 [N] in nats, top_ids int64 and top_log_p float64 [N, k], of the distribution that
    predicts the node; log_mass float64 [N], of certain tokens under it.
    """

    log_p: Float64s
    rank: Ints
    entropy: Float64s | None = None
    top_ids: Ints | None = None
    top_log_p: Float64s | None = None
    log_mass: Float64s | None = None

    def of(self, path: Ints) -> NodeValues:
        """Those of some nodes, in this order."""
        return NodeValues(*(None if v is None else v[path] for v in self))  # type: ignore[arg-type]


def node_log_probs(
    model: nn.Module, forest: Forest, *, chunk: int = CHUNK_NODES, route: Route = "auto"
) -> Float64s:
    """log Pr(token | path) of every node, float64 [N]; NaN at roots, which have no context. No gradients."""
    return node_values(model, forest, chunk=chunk, route=route, ranks=False).log_p


@torch.no_grad()
def node_values(
    model: nn.Module,
    forest: Forest,
    scored: bool | npt.NDArray[np.bool_] = True,
    *,
    chunk: int = CHUNK_NODES,
    route: Route = "auto",
    ranks: bool = True,
    entropy: bool = False,
    top_k: int = 0,
    mass_of: tuple[int, ...] = (),
) -> NodeValues:
    """log Pr(token | path) and its rank, of the `scored` nodes; no rank without `ranks`; on request the entropy of the
    distribution, its most probable tokens, and the log Pr of any of the tokens `mass_of`.

    NaN and −1 elsewhere, and at roots, which have no context. The forest is streamed, `chunk` nodes at a time, with the
    keys and values of the current path: memory is bounded by the chunk. route: see `hidden_states`. Raises ModelError
    where the model itself gives NaN.
    """
    edges = forest.edges(scored)
    head = head_of(model)
    found = _empty(len(forest), min(top_k, len(head.weight)), entropy, bool(mass_of))
    some = torch.tensor(mass_of)
    for part, hidden in stream_hidden(model, forest, chunk=chunk, route=route, needed=np.unique(edges.rows)):
        at, local = edges.leaving(part)
        rows, targets = (torch.from_numpy(a).to(hidden.device) for a in (local, edges.targets[at]))
        values = head_values(hidden, head, rows, targets, ranks=ranks, entropy=entropy)
        top = most_probable(hidden, head, rows, top_k) if top_k and len(rows) else (None, None)
        mass = log_mass(hidden, head, rows, some.to(rows.device)) if mass_of and len(rows) else None
        _fill(found, (*values, *top, mass), edges.nodes[at])
    _refuse_nan(model, found.log_p[edges.nodes])
    return found


def _fill(arrays: Iterable[Any], values: Iterable[Tensor | None], nodes: Ints) -> None:
    for array, value in zip(arrays, values, strict=True):
        if array is not None and value is not None:
            array[nodes] = value.cpu().numpy()


def _empty(count: int, k: int, entropy: bool, mass: bool) -> NodeValues:
    return NodeValues(
        np.full(count, np.nan),
        np.full(count, -1),
        np.full(count, np.nan) if entropy else None,
        np.full((count, k), -1) if k else None,
        np.full((count, k), np.nan) if k else None,
        np.full(count, np.nan) if mass else None,
    )


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
