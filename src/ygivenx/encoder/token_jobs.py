"""Rows of token ids to sequences: ids as they are given, weights by policy, nothing encoded."""

from __future__ import annotations

import numpy as np

from ..errors import RowError
from ..rows.nouns import TokenRow
from ..sequence import Sequence
from .assemble import Job, Options, fitted, made
from .policy import Part, weight_of


def token_job(row: TokenRow, options: Options) -> Job:
    """No text to encode, and the sequence. Raises RowError for an id that the tokenizer doesn't have."""
    _check_ids(row, len(options.tokens.tokenizer))
    return Job([], lambda parts: fitted([_sequence(row, options)], options.max_length, options.overflow))


def _check_ids(row: TokenRow, size: int) -> None:
    if len(beyond := np.flatnonzero(row.ids >= size)):
        what = f"the id {row.ids[beyond[0]]} isn't in this tokenizer's vocabulary of {size}"
        why = "the row was written with another tokenizer: the same ids would be other texts"
        raise RowError(what, reason="bad_token", field=f"token {beyond[0]}", why=why)


def _sequence(row: TokenRow, options: Options) -> Sequence:
    """Of y the policy's factor times the row's own weights; of the prompt the policy alone, as rows have no say in it.

    A token of weight 0 after the prompt is context by the row's own word, whatever the policy.
    """
    weights, segments = row.weights.copy(), row.segments()
    for s in segments:
        if s.output:
            weights[s.start : s.stop] *= weight_of(options.policy, Part(s.kind, True, last=True))
    weights[: row.prompt_length] = weight_of(options.policy, Part("prompt", False))
    return made(row.ids, weights, segments, (), row.notes)
