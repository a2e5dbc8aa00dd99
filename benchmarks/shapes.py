"""Models of known shapes with random weights: neither the time nor the memory of a step depends on them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


def _llama(**sizes: Any) -> Any:
    return LlamaForCausalLM, LlamaConfig(max_position_embeddings=131_072, tie_word_embeddings=True, **sizes)


def _qwen3(**sizes: Any) -> Any:
    return Qwen3ForCausalLM, Qwen3Config(max_position_embeddings=131_072, tie_word_embeddings=True, **sizes)


SHAPES = {
    "SmolLM2-135M": _llama(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3,
    ),
    "Llama-3.2-1B": _llama(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8,
    ),
    "Qwen3-1.7B": _qwen3(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip


def random_model(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """In eval mode, on the device."""
    kind, config = SHAPES[name]
    torch.manual_seed(0)
    with torch.device(device):
        return kind(config).to(dtype).eval()
