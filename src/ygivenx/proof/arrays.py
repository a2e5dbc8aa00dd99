"""Batches as NumPy sees them."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_array(values: Any) -> np.ndarray:
    """A NumPy array of a tensor on any device, or of anything that NumPy takes."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def documents_of(position_ids: Any, attended: np.ndarray) -> np.ndarray:
    """int64 [B, T]: the packed document of each token: a new one begins where positions restart at 0."""
    if position_ids is None or np.ndim(position_ids) != 2:
        return np.zeros(attended.shape, np.int64)
    positions = np.broadcast_to(as_array(position_ids), attended.shape)
    starts = (positions == 0) & attended
    documents: np.ndarray = np.maximum(np.cumsum(starts, 1) - 1, 0)
    return documents
