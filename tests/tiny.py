"""Small random models and chain sequences for tests where the real model isn't the point."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ygivenx.scores.requests import RequestBuilder
from ygivenx.scores.scoring import Score, scores
from ygivenx.sequence import Segment, Sequence

VOCAB = 97


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | overrides)).to(dtype).eval()


def sequences(count: int, seed: int = 0, low: int = 6, high: int = 24) -> list[Sequence]:
    """Random [x, y] pairs: the last third of each is y, with weight 1."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        length = int(rng.integers(low, high))
        cut = length - max(2, length // 3)
        weights = np.zeros(length, np.float32)
        weights[cut:] = 1
        segments = (Segment(0, cut, "prompt"), Segment(cut, length, "answer", output=True))
        out.append(Sequence(rng.integers(0, VOCAB, length), weights, segments))
    return out


def score_sequences(model, rows: list[Sequence], **options) -> list[Score]:
    """Scores of sequences whose segments say what is y; options of `scores`."""
    builder = RequestBuilder(None)
    return list(scores(model, (request for row in rows for request in builder(row)), **options))
