"""FlexAttention over a forest, on CUDA: the mask is a function of `end`, and so is which blocks of it are skipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..forest import Ints
from .plan import Plan

Bools = NDArray[np.bool_]

TOKENS_PER_BLOCK = 128  # queries and keys of a block that the kernel computes or skips as a whole
NARROWEST = 16  # numbers of a head that tensor cores multiply at least
SPECIALISED = 64  # compiled variants at most: by dtype, width, window, soft-cap, with gradients or without


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether there is one for these: on CUDA not for narrow heads; and few queries aren't worth compiling it."""
    narrow = min(query.shape[-1], value.shape[-1]) < NARROWEST
    return not query.is_cuda or (query.shape[2] >= TOKENS_PER_BLOCK and not narrow)


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> Tensor:
    """softmax(softcap(scale·q·k)) over what the mask allows; on a CPU slowly, and without gradients."""
    run = _compiled() if query.is_cuda else flex_attention
    score_mod = None if softcap is None else _capped(torch.full_like(query[0, :, 0, 0], softcap))
    gqa = query.shape[1] != key.shape[1]
    out: Tensor = run(
        query, key, value,
        score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=_precision(query),
    )  # fmt: skip
    return out


def _precision(query: Tensor) -> dict[str, Any] | None:
    """float32 as three products of tensor cores, where there are such: as exact as without them, and faster."""
    if query.dtype != torch.float32 or not query.is_cuda or torch.version.hip:
        return None
    able = torch.cuda.get_device_capability(query.device) >= (8, 0)
    partial_blocks = torch.get_float32_matmul_precision() == "highest"  # else one product in TF32 will do
    return {"FLOAT32_PRECISION": "'tf32x3'"} if able and partial_blocks else None


def _capped(softcap: Tensor) -> Callable[..., Tensor]:
    """softcap: [heads], of one value; see `flex_mask` for why it is a tensor."""

    def capped(score: Tensor, _b: Tensor, h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap[h] * torch.tanh(score / softcap[h])

    return capped


@cache
def _compiled() -> Any:
    config: Any = torch._dynamo.config
    # The latter is its name before torch 2.7.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), SPECIALISED))
    # Whole graphs only: beyond the limit torch would otherwise go on with all weights of attention in memory.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def flex_mask(plan: Plan, window: int | None) -> BlockMask:
    """Of queries [K - first] and keys [K]: a function for each of them, and which blocks of them need asking it.

    The function reads tensors alone: where sizes are dynamic, numbers are symbols to torch's compiler, and with some,
    such as a soft-cap, it fails.
    """

    def put(values: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(plan.device)

    end, depth, place = put(plan.end), put(plan.depth), put(np.arange(plan.first, len(plan.end)))
    out_of_window = None if window is None else put(plan.depth[plan.first :] - window)

    def allowed(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= place[q]) & (place[q] < end[k])
        return seen if out_of_window is None else seen & (depth[k] > out_of_window[q])

    some, every = pairs_of_blocks(plan.end, plan.depth, plan.first, window)
    (partial_blocks, which), (whole, which_whole) = (map(put, _listed(m)) for m in (some & ~every, every))
    return BlockMask.from_kv_blocks(
        partial_blocks, which, whole, which_whole,
        BLOCK_SIZE=TOKENS_PER_BLOCK, mask_mod=allowed, seq_lengths=(len(place), len(end)),
    )  # fmt: skip


def pairs_of_blocks(end: Ints, depth: Ints, first: int, window: int | None) -> tuple[Bools, Bools]:
    """bool [query blocks, key blocks] twice: where some query may see some key, and where all see all."""
    count = len(end)
    q, k = np.arange(first, count, TOKENS_PER_BLOCK), np.arange(0, count, TOKENS_PER_BLOCK)
    q_stop, k_stop = np.minimum(q + TOKENS_PER_BLOCK, count), np.minimum(k + TOKENS_PER_BLOCK, count)
    end_least, end_most = np.minimum.reduceat(end, k), np.maximum.reduceat(end, k)
    some = (k < q_stop[:, None]) & (end_most > q[:, None])
    # The kernel asks nothing in these, so they must not reach beyond the last token.
    complete = (q_stop - q == TOKENS_PER_BLOCK)[:, None] & (k_stop - k == TOKENS_PER_BLOCK)
    every = complete & (k_stop <= q[:, None] + 1) & (end_least >= q_stop[:, None])
    if window is not None:
        q_depth, k_depth = depth[first:], depth
        q = q - first
        some &= np.minimum.reduceat(q_depth, q)[:, None] - np.maximum.reduceat(k_depth, k) < window
        every &= np.maximum.reduceat(q_depth, q)[:, None] - np.minimum.reduceat(k_depth, k) < window
    return some, every


def _listed(chosen: Bools) -> tuple[Any, Any]:
    """(how many, int32 [1, 1, rows]; which, those first, int32 [1, 1, rows, columns]) of a mask of blocks."""
    order = np.argsort(~chosen, axis=1, kind="stable")
    return chosen.sum(1, dtype=np.int32)[None, None], order.astype(np.int32)[None, None]
