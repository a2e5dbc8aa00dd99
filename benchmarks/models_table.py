"""Every causal model type of the installed transformers, built small: is it exact, and does it share?

    python benchmarks/models_table.py [TYPE ...] [--write docs/models.md]
    make newest-models    the same of the newest transformers: what differs from the table (--beside docs/models.md)

Each type is built with random weights (a few layers, hidden size 32) and computes the loss of branching sequences. The
definition that it is compared with is `ygivenx.reference.loss`: one sequence at a time, all logits, float64. A type is
exact where the loss is off by at most 1e-5 (relative) and no parameter's gradient by more than 1e-3 (relative, L2).
Types that look ahead are named and not counted: what they read isn't a prefix.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import YgivenxError
from ygivenx.models.sharing import reason_unshared

LOSS, GRADIENT = 1e-5, 1e-3  # relative errors that count as exact in float32
MOST = 40_000_000  # parameters; a type whose smallest form is larger isn't built
VOCABULARY = 97

# What the fields of configs are set to, under the names that transformers' families give them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim",
                     "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff", "d_inner",
                     "feed_forward_size", "ffn_hidden_size", "dim_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers",
                     "num_decoder_layers"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "dim_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("sliding_window", "local_attention", "attention_window_size", "window_size"), 12),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size",
                     "expert_ffn_hidden_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "num_expert_group", "first_k_dense_replace",
                     "moe_num_shared_experts", "mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_num_heads", "mamba_head_dim",
                     "n_mamba_heads", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "mamba_d_ssm": 64, "mamba_expand": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "index_n_heads": 2,
    "index_topk": 64, "attention_chunk_size": 16, "rotary_dim": 4, "vocab_size": VOCABULARY, "initializer_range": 0.2,
    "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4, "position_bias_max_distance": 64, "num_block": 1,
    "time_step_rank": 4, "mamba_dt_rank": 4, "tie_word_embeddings": False,
    "use_cache": False,
}  # fmt: skip

# What reads images or sound, which rows of text don't reach.
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
BYTES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
           "indexer_compress_ratio": 4, "hc_lowrank": 8, "layer_types": ["linear_attention"] * 3 + ["indexed_attention"]
           }  # fmt: skip

SLIDING_LATENT = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8,
                  "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
ROTARY = {kind: {"rope_type": "default", "rope_theta": 50_000.0, "partial_rotary_factor": 0.5}
          for kind in ("indexed_attention", "sliding_attention")}  # fmt: skip
# They aren't language models of text by themselves: transformers has no way to build them, or they need another one.
NOT_ALONE = {
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it drafts with another model's keys and values"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "its tokens are codes of sound, several at each position"),
}  # fmt: skip

# What these need that isn't installed here.
UNINSTALLED = {"gemma3n": "its part for images needs timm and Pillow; its language model is gemma3n_text"}

# What single types need beyond that; of a sub-config, beyond its own sizes.
FURTHER: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"patch_in_forward": False, "patcher_config": BYTES, "encoder_config": BYTES | {"hidden_size_global": 32},
            "decoder_config": BYTES | {"hidden_size_global": 32}, "global_config": BYTES,
            "encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0,
                                                                   "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots3_note": {"vision_config": TOWER | {"adapter_in_dim": 32, "adapter_out_dim": 32, "num_local_experts": 2,
                                             "moe_intermediate_size": 16, "mlp_layer_types": ["dense"] * 2},
                   "audio_config": TOWER | {"adapter_input_size": 32, "adapter_out_dim": 32, "feature_size": 8,
                                            "downsample_hidden_size": 8}},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 16, "rope_parameters": ROTARY,
                        "per_layer_config": {1: SLIDING_LATENT, 3: SLIDING_LATENT}},
    "fuyu": {"image_size": 28, "patch_size": 14},
    "gemma3": {"vision_config": TOWER | {"model_type": "siglip_vision_model"}},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
                     "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.0] * 2},
    "git": {"vision_config": TOWER},
    "got_ocr2": {"vision_config": TOWER | {"mlp_dim": 48, "output_channels": 16, "global_attn_indexes": [1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "moss_transcribe_diarize": {"audio_config": TOWER | {"num_mel_bins": 8, "max_source_positions": 16}},
    "phi4_multimodal": {"vision_config": TOWER | {"crop_size": 28},
                        "audio_config": BYTES | {"num_blocks": 2, "ext_pw_out_channel": 32, "input_size": 8,
                                                 "depthwise_separable_out_channel": 32, "nemo_conv_channels": 16}},
    "qwen4_exp": {"text_config": INDEXER, "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48,
                                                            "num_heads": 4, "out_hidden_size": 32}},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"],
                 "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
              "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
               "attention_head_dim": 16, "num_key_value_heads": 4, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """What was found of one type. kind: shared, unshared, refused, looks ahead, or not built."""

    name: str
    kind: str
    why: str = ""
    loss: float = 0.0
    gradient: float = 0.0

    @property
    def exact(self) -> bool:
        return self.kind in ("shared", "unshared") and self.loss <= LOSS and self.gradient <= GRADIENT


def small_config(cls: Any, further: dict[str, Any]) -> Any:
    """A config with all sizes that SIZES names and `further`, and those of its text's sub-config likewise."""
    default = cls()
    known = set(default.to_dict()) | set(inspect.signature(cls.__init__).parameters)
    settings = {k: v for k, v in SIZES.items() if k in known}
    if "qk_rope_head_dim" in known:  # its head_dim is that of the rotated part, set by the config itself
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1 and "layer_types" in known:  # each kind of layer at least once
        settings["layer_types"] = [kinds[i % len(kinds)] for i in range(4)]
    for key in getattr(cls, "sub_configs", None) or ():
        if "text" in key and (sub := getattr(default, key, None)) is not None:
            own = FURTHER.get(sub.model_type, {}) | further.get(key, {})
            settings[key] = small_config(type(sub), own)
    return cls(
        **settings | {k: v for k, v in further.items() if not isinstance(settings.get(k), PreTrainedConfig)}
    )


def build(name: str) -> Any:
    """The causal model of a type, small and random, in eval mode."""
    config = small_config(CONFIG_MAPPING[name], FURTHER.get(name, {}))
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters at its smallest here")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms of one and biases of zero would hide mistakes
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def rows() -> list[yx.Sequence]:
    """Branching sequences with random weights; one of them is a prefix of another."""
    rng = np.random.default_rng(2)
    trunk = rng.integers(3, VOCABULARY, 20)
    tails = [rng.integers(3, VOCABULARY, n) for n in (7, 15, 4)]
    found = [np.concatenate((trunk, tail)) for tail in tails]
    found += [np.concatenate((found[1][:27], rng.integers(3, VOCABULARY, 9))), found[1][:24]]
    found.append(rng.integers(3, VOCABULARY, 11))
    return [yx.Sequence(ids, np.where(np.arange(len(ids)) > 0, rng.random(len(ids)), 0)) for ids in found]


@torch.no_grad()
def looks_ahead(model: Any) -> bool:
    """Whether what follows changes what the model says of a prefix."""
    ids = torch.arange(3, 20)[None]
    whole, prefix = (model(input_ids=i).logits[0, :9].double() for i in (ids, ids[:, :9]))
    return bool((whole - prefix).norm() > 1e-3 * prefix.norm())


def gradients(model: Any, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def worst(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor; one that is zero but for rounding has none."""
    floor = 1e-6 * max(g.norm() for g in exact.values())
    zero = torch.zeros(())
    pairs = ((ours.get(n, zero), exact.get(n, zero)) for n in ours.keys() | exact.keys())
    return float(max(((a - b).norm() - floor).clamp(min=0) / b.norm().clamp(min=floor) for a, b in pairs))


def measure(name: str) -> Line:
    if name in NOT_ALONE:
        return Line(name, "not built", NOT_ALONE[name])
    try:
        model = build(name)
        ahead = looks_ahead(model)
    except Exception as error:  # of transformers, which we ask for something that it may not have
        if isinstance(error, ImportError) and name in UNINSTALLED:
            return Line(name, "not built", UNINSTALLED[name])
        return Line(name, "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:90]}")
    sequences = rows()
    try:
        found = yx.loss(model, sequences)
        why = reason_unshared(model, found.forest, "auto", in_chunks=False)
        ours = gradients(model, found.value)
    except YgivenxError as error:
        return Line(name, "looks ahead" if ahead else "refused", error.what)
    expected = reference.loss(model, sequences)
    off = abs(found.value.item() - expected.item()) / abs(expected.item())
    return Line(name, "unshared" if why else "shared", why, off, worst(ours, gradients(model, expected)))


def summary(lines: list[Line]) -> Iterator[str]:
    causal = [line for line in lines if line.kind not in ("looks ahead", "not built")]
    exact = [line for line in causal if line.exact]
    shared = [line for line in exact if line.kind == "shared"]
    share = max(len(causal), 1)
    yield (
        f"{len(causal)} causal types of transformers {transformers.__version__} are built: {len(exact)} are exact "
        f"({len(exact) / share:.0%}), and {len(shared)} of them share ({len(shared) / share:.0%})."
    )
    counts = Counter(line.kind for line in lines)
    yield f"Further {counts['looks ahead']} look ahead, and {counts['not built']} aren't built by this script."


def route(line: Line) -> str:
    inexact = line.kind in ("shared", "unshared") and not line.exact
    return f"**{line.kind}, inexact**" if inexact else line.kind


def table(lines: list[Line]) -> Iterator[str]:
    yield "| type | route | loss off by | worst gradient off by | why |"
    yield "|---|---|---|---|---|"
    for line in lines:
        exact = f"{line.loss:.0e} | {line.gradient:.0e}" if line.kind in ("shared", "unshared") else "– | –"
        yield f"| {line.name} | {route(line)} | {exact} | {line.why.replace('|', '/')} |"


TABLE = "<!-- table: python benchmarks/models_table.py --write docs/models.md -->", "<!-- end of table -->"
NEWEST = "<!-- newest: make newest-models -->", "<!-- end of newest -->"


def replaced(page: str, marks: tuple[str, str], lines: Iterable[str]) -> str:
    """The page with these lines between two marks."""
    before, after = page.split(marks[0])[0], page.split(marks[1])[1]
    return "\n".join([before + marks[0], *lines, marks[1] + after])


def differing(page: str, lines: list[Line]) -> list[Line]:
    """Those that the page's table hasn't, or has with another route."""
    rows = [
        row.split(" | ")
        for row in page.split(TABLE[0])[1].split(TABLE[1])[0].splitlines()
        if row.startswith("| ")
    ]
    known = {row[0][2:]: row[1] for row in rows}
    return [line for line in lines if known.get(line.name) != route(line)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; by default all")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    parser.add_argument("--beside", type=Path, help="a page that is to say what differs from its table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    lines = []
    for name in arguments.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        lines.append(measure(name))
        print(lines[-1], flush=True)
    print(*summary(lines), sep="\n")
    if arguments.write:
        page = arguments.write.read_text()
        arguments.write.write_text(replaced(page, TABLE, [*summary(lines), "", *table(lines)]))
    if arguments.beside:
        page = arguments.beside.read_text()
        other = [*summary(lines), "", *table(differing(page, lines))]
        arguments.beside.write_text(replaced(page, NEWEST, other))
    judged = [line for line in lines if line.kind not in ("looks ahead", "not built", "refused")]
    return 0 if all(line.exact for line in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
