"""Which tokens of a batch depend on others that they should not see: other documents, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..models.families import decoder_of
from .evidence import Leak, ObservedRow
from .wrapping import uncompiled, unwrap

if TYPE_CHECKING:
    from torch import nn

DOCUMENTS = 6  # of a row that are tested: each costs a backward pass


def leaks_in(steps: list[ObservedRow], model: Any, batches: Sequence[Mapping[str, Any]]) -> list[Leak]:
    """Documents that depend on others, tokens that depend on padding: in the first row that has several."""
    leaks = []
    for seen in steps:
        groups = _groups(seen)
        if groups is None or seen.micro_batch >= len(batches):
            continue
        batch = batches[seen.micro_batch]
        if "input_ids" not in batch or np.shape(batch["input_ids"])[-1] != len(seen.ids):
            continue
        row = {k: v[seen.row : seen.row + 1] if _per_row(v, batch) else v for k, v in batch.items()}
        matrix = leakage(model, row, groups[None])
        padded = bool(seen.padding.any())
        for g, k in np.argwhere(matrix > 1e-6).tolist():
            if g != k and not (padded and g == groups.max()):
                what = "padding" if padded and k == groups.max() else "document"
                leaks.append(Leak(what, f"{seen.where}, documents {g} and {k}", float(matrix[g, k])))
        break
    return leaks


def _groups(seen: ObservedRow) -> np.ndarray | None:
    """int [T]: the document of each token, padding as the last group; None for a row of one."""
    groups = np.full(len(seen.ids), -1)
    spans = [(p.start, p.stop) for p in seen.pieces]
    if len(spans) > 1:
        for g, (start, stop) in enumerate(spans[:DOCUMENTS]):
            groups[start:stop] = g
    else:
        groups = np.where(seen.documents < DOCUMENTS, seen.documents, -1)
    groups[seen.padding] = -1
    if seen.padding.any():
        groups[seen.padding] = groups.max() + 1
    return groups if groups.max() > 0 else None


def _per_row(value: Any, batch: Mapping[str, Any]) -> bool:
    return np.ndim(value) > 0 and np.shape(value)[0] == np.shape(batch["input_ids"])[0]


def leakage(model: nn.Module, inputs: dict[str, Any], groups: np.ndarray) -> np.ndarray:
    """How much each group of tokens depends on the others, float64 [G, G]: ∂ hidden / ∂ embedding.

    inputs: what the model would be fed (labels are ignored). groups int [B, T]: the document of each token,
    numbered from 0 over the whole batch, −1 for tokens of none. Entry [g, k] is the norm of the gradient of a
    random projection of g's last hidden states at k's embeddings, relative to [g, g]: exactly 0 where
    attention keeps them apart. Gradients, weights and random state of the model are left alone.
    """
    core = unwrap(model)
    kept: list[Tensor] = []

    def keep(_m: nn.Module, _a: tuple[Any, ...], out: Tensor) -> Tensor:
        kept.append(out.detach().requires_grad_(True))
        return kept[-1]

    arguments = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", "num_items_in_batch")}
    hook = core.get_input_embeddings().register_forward_hook(keep)
    modes = [(m, m.training) for m in core.modules()]
    core.eval()  # dropout would be noise here, and would draw random numbers
    try:
        with torch.enable_grad(), uncompiled():
            hidden = decoder_of(core)(**{**arguments, "use_cache": False})[0]
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training
    return _dependence(hidden, kept[-1], groups)


def _dependence(hidden: Tensor, embedded: Tensor, groups: np.ndarray) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(hidden.shape, generator=generator).to(hidden)
    count = int(groups.max()) + 1
    matrix = np.zeros((count, count))
    members = [torch.from_numpy(groups == g).to(hidden.device) for g in range(count)]
    for g, own in enumerate(members):
        total = (hidden * direction)[own].sum()
        (grad,) = torch.autograd.grad(total, embedded, retain_graph=True)
        matrix[g] = [float(grad[other].double().norm()) for other in members]
    return matrix / np.maximum(np.diag(matrix)[:, None], 1e-300)
