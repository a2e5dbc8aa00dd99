"""Recurrent layers over a forest: every log p and every gradient is that of the sequences alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from tiny import VOCAB
from transformers import AutoModelForCausalLM
from trees import assert_same, distances, gradients, tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.models import lightning, recurrent
from ygivenx.models.families import decoder_of
from ygivenx.models.segments import segments
from ygivenx.models.sharing import sharing_of
from ygivenx.scores.node_log_probs import node_log_probs
from ygivenx.sequence import Sequence

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 16,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16,
}  # fmt: skip
OWN_MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
THREE_TO_ONE = ["linear_attention"] * 3 + ["full_attention"]
CONVOLUTIONS = ["conv", "conv", "full_attention", "conv"]
CASES = {
    "qwen3_next": ("Qwen3Next", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_5": ("Qwen3_5Text", DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeText", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, "linear_num_key_heads": 4}),
    "kimi_linear": ("KimiLinear", {**LATENT, "linear_head_dim": 8, "linear_num_heads": 4, "num_local_experts": 4,
                                   "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 4,
                                   "layer_types": THREE_TO_ONE}),
    "lfm2": ("Lfm2", {"layer_types": CONVOLUTIONS}),
    "lfm2_moe": ("Lfm2Moe", {**EXPERTS, "layer_types": CONVOLUTIONS, "num_dense_layers": 1}),
    "lfm3": ("Lfm3", {"layer_types": CONVOLUTIONS}),
    "mamba2": ("Mamba2", OWN_MAMBA2),
    "bamba": ("Bamba", {**MAMBA2, "attn_layer_indices": [3]}),
    "granite": ("GraniteMoeHybrid", {**MAMBA2, "layer_types": THREE_TO_ONE, "num_local_experts": 4,
                                     "num_experts_per_tok": 2, "shared_intermediate_size": 24}),
    "falcon_h1": ("FalconH1", {**MAMBA2, "mamba_d_ssm": 64, "ssm_multipliers": [0.5, 0.7, 0.6, 0.8, 0.35]}),
    "nemotron_h": ("NemotronH", {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2,
                                 "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
                                 "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
                                 "layer_types": ["linear_attention", "moe", "full_attention", "linear_attention"]}),
    "zamba2": ("Zamba2", {"mamba_d_state": 8, "n_mamba_heads": 8, "chunk_size": 16, "num_mem_blocks": 1,
                          "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4,
                          "use_mem_rope": True, "use_shared_attention_adapter": True, "adapter_rank": 4}),
    "mamba": ("Mamba", {"state_size": 4}),
    "falcon_mamba": ("FalconMamba", {"state_size": 4}),
    "jamba": ("Jamba", {"mamba_d_state": 4, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 4,
                        "attn_layer_offset": 3, "use_mamba_kernels": False}),
    "zamba": ("Zamba", {"mamba_d_state": 4, "mamba_dt_rank": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
                        "num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}),
    "recurrent_gemma": ("RecurrentGemma", {"lru_width": 48, "attention_window_size": 32,
                                           "block_types": ["recurrent", "recurrent", "attention"]}),
    "rwkv": ("Rwkv", {"attention_hidden_size": 48, "rescale_every": 0, "use_cache": False}),
    "minimax": ("MiniMax", {"num_local_experts": 4, "block_size": 32}),
}  # fmt: skip


def build(case: str):
    name, extra = CASES[case]
    own_heads = {"head_dim"} if name == "Zamba2" else set()  # it works them out
    settings = {k: v for k, v in (COMMON | extra).items() if k not in own_heads}
    config = getattr(transformers, name + "Config")(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for n, p in model.named_parameters():  # biases of zero and states that decay at once would hide mistakes
        if n.endswith("A_log"):
            torch.nn.init.normal_(p, mean=-2.5, std=0.5)
        elif p.ndim == 1 and not n.endswith("dt_bias"):
            torch.nn.init.normal_(p, mean=float("norm" in n and "qwen" not in case), std=0.1)
        elif p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3 if "conv" in n else 0.15)
    return model


def uneven() -> list[Sequence]:
    """A deep tree: segments of one level differ in length, some hold one token, and some roots have one node."""
    rng = np.random.default_rng(3)
    a, b, c, d = (rng.integers(1, VOCAB, n) for n in (5, 90, 1, 20))
    rows = [[*a, 1, *b], [*a, 2, *c, 3, *d], [*a, 2, *c, 4], [*a, 2, *c, 4, *d], [*a, 2, *c, 5, 6], [*d[:1], *a],
            [*d[:1], *b], [*b[:1], 7], [*b, *a], [9, 8]]  # fmt: skip
    return [Sequence(ids, np.r_[0.0, rng.random(len(ids) - 1)]) for ids in rows]


FORESTS = {"random": lambda: tree(2), "uneven": uneven}


@pytest.mark.parametrize("shape", FORESTS)
@pytest.mark.parametrize("case", CASES)
def test_shared_equals_alone(case, shape):
    model, rows = build(case), FORESTS[shape]()
    expected = reference.loss(model, rows)
    wanted = gradients(model, expected)
    out = yx.loss(model, rows)
    assert not sharing_of(model).reason
    assert out.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, out.value), wanted)


BAILING = {**LATENT, "num_local_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "head_dim": 8,
           "moe_intermediate_size": 24, "num_key_value_heads": 4, "layer_types": THREE_TO_ONE}  # fmt: skip


def test_a_rule_that_rounds_more_in_chunks_is_exact_token_by_token(monkeypatch):
    """Its decay is strong: the model's own gradients by chunks of 64 are 1e-4 from those token by token."""
    from transformers.models.bailing_hybrid import modeling_bailing_hybrid as family

    monkeypatch.setitem(CASES, "bailing_hybrid", ("BailingHybrid", BAILING))
    model, rows = build("bailing_hybrid"), uneven()
    by_chunks = gradients(model, yx.loss(model, rows).value)
    monkeypatch.setattr(family, "chunk_kimi_delta_attention", family.recurrent_kimi_delta_attention)
    exact = gradients(model, reference.loss(model, rows))
    assert_same(gradients(model, yx.loss(model, rows).value), exact)
    assert_same(by_chunks, exact, 5e-4)


def slow_segments(end: np.ndarray) -> dict[int, tuple[int, int]]:
    """(first node, level) of each node's segment, from the definition."""
    found: dict[int, tuple[int, int]] = {}
    for node in range(len(end)):
        above = [k for k in range(node) if end[k] > node]
        siblings = [n for n in range(len(end)) if [k for k in range(n) if end[k] > n] == above]
        if above and len(siblings) == 1:
            found[node] = found[above[-1]]
        else:
            found[node] = node, found[above[-1]][1] + 1 if above else 0
    return found


@pytest.mark.parametrize("seed", range(12))
def test_segments_are_runs_without_branches(seed):
    end = yx.Forest.of(tree(seed, count=6, high=9, vocab=3)).fed_end
    made, slow = segments(end), slow_segments(end)
    of_node = np.repeat(np.arange(len(made.start)), made.length)
    assert len(of_node) == len(end)
    for node, s in enumerate(of_node.tolist()):
        assert (int(made.start[s]), int(made.level[s])) == slow[node]
    for s, parent in enumerate(made.parent.tolist()):
        above = [k for k in range(made.start[s]) if end[k] > made.start[s]]
        assert parent == (of_node[above[-1]] if above else -1)
    assert set(np.flatnonzero(made.inner).tolist()) == set(made.parent.tolist()) - {-1}


@pytest.mark.parametrize("case", CASES)
def test_padding_would_change_states(monkeypatch, case):
    """The guard trips: without idle steps, segments of unequal length end in other states."""
    model, rows = build(case), uneven()
    right, kind = yx.loss(model, rows).value.item(), type(recurrent.mixers(decoder_of(model))[0]).__name__
    if kind == lightning.LAYER:
        after = lightning._after
        whole = lambda layer, state, k, v, n: after(layer, state, k, v, torch.full_like(n, k.shape[2]))  # noqa: E731
        monkeypatch.setattr(lightning, "_after", whole)
    elif not recurrent.GATES.get(kind):
        pytest.skip("a convolution keeps its last inputs, a scan pads nothing")
    monkeypatch.setitem(recurrent.GATES, kind, {})
    assert yx.loss(model, rows).value.item() != pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("case", ["qwen3_5", "nemotron_h", "lfm2", "jamba", "mamba", "minimax", "rwkv",
                                  "recurrent_gemma", "zamba"])  # fmt: skip
def test_gradient_checkpointing_runs_segments_again(case):
    model, rows = build(case), uneven()
    wanted = gradients(model, yx.loss(model, rows).value)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(gradients(model, yx.loss(model, rows).value), wanted, 1e-5)


@pytest.mark.parametrize(("case", "targets"), [("qwen3_5", ["in_proj_qkv", "in_proj_a", "in_proj_b", "out_proj"]),
                                               ("bamba", ["in_proj", "out_proj"])])  # fmt: skip
def test_adapters_on_mixers(case, targets):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(case), peft.LoraConfig(target_modules=targets, r=4))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    wanted = gradients(model, reference.loss(model, uneven()))
    assert wanted
    assert_same(gradients(model, yx.loss(model, uneven()).value), wanted)


@pytest.mark.parametrize(
    "case", ["qwen3_5", "mamba2", "lfm2", "falcon_h1", "minimax", "rwkv", "recurrent_gemma"]
)
def test_bfloat16_is_as_near_as_sequences_alone(case):
    model, rows = build(case), uneven()
    exact = gradients(model, reference.loss(model, rows))
    with torch.autocast("cpu", torch.bfloat16):
        apart, ours = (
            distances(gradients(model, value), exact)
            for value in (reference.loss(model, rows), yx.loss(model, rows).value)
        )
    assert np.median(ours) <= 1.25 * np.median(apart) + 1e-3


def test_factors_that_half_precision_rounds_share():
    """In float32 the layer's own way and ours are the same, and rounded factors are put back as they were."""
    model, rows = build("minimax").to(torch.bfloat16), uneven()
    kept = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        expected, found = reference.loss(model, rows).item(), yx.loss(model, rows).value.item()
    assert not sharing_of(model).reason
    assert found == pytest.approx(expected, rel=5e-3)
    assert all(torch.equal(b, kept[n]) and b.dtype == kept[n].dtype for n, b in model.named_buffers())


def test_a_copy_of_a_model_computes_with_its_own_weights():
    model, rows = build("qwen3_5"), uneven()
    before = yx.loss(model, rows).value.item()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for mixer in recurrent.mixers(decoder_of(other)):
            mixer.out_proj.weight.mul_(2)
    expected = reference.loss(other, rows).item()
    assert expected != pytest.approx(before, rel=1e-3)
    assert yx.loss(other, rows).value.item() == pytest.approx(expected, rel=1e-5)
    assert yx.loss(model, rows).value.item() == before


def test_one_call_for_all_segments_of_a_level():
    """Eight completions of one prompt: two calls per layer, not nine."""
    model, calls = build("qwen3_5"), []
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, 20)
    rows = [np.concatenate((prompt, rng.integers(0, VOCAB, 10 + i))) for i in range(8)]
    mixer = recurrent.mixers(decoder_of(model))[0]
    mixer.in_proj_qkv.register_forward_hook(lambda *_: calls.append(1))
    yx.loss(model, [Sequence(ids, np.r_[0.0, np.ones(len(ids) - 1)]) for ids in rows])
    compared = len(calls)
    yx.loss(model, [Sequence(ids, np.r_[0.0, np.ones(len(ids) - 1)]) for ids in rows])
    assert len(calls) - compared == 2


CHUNKED = sorted(CASES.keys() - {"mamba", "falcon_mamba", "jamba", "zamba", "recurrent_gemma", "rwkv"})


@pytest.mark.parametrize("shape", FORESTS)
@pytest.mark.parametrize("case", CHUNKED)
def test_chunks_begin_in_the_states_of_their_path(case, shape):
    model, rows = build(case), FORESTS[shape]()
    expected = yx.loss(model, rows)
    wanted, log_p = gradients(model, expected.value), expected.log_p
    for chunk in (37, 8):
        out = yx.loss(model, rows, chunk=chunk)
        assert torch.allclose(out.log_p, log_p, rtol=1e-4, atol=1e-5)
        assert_same(gradients(model, out.value), wanted)
        assert np.allclose(node_log_probs(model, yx.Forest.of(rows), chunk=chunk),
                           node_log_probs(model, yx.Forest.of(rows)), rtol=1e-4, atol=1e-5, equal_nan=True)  # fmt: skip


BY_NAME = {
    "cache": lambda own: lambda hidden_states, cache=None, **_: own(hidden_states, cache),
    "cache_params": lambda own: (
        lambda hidden_states, cache_params=None, **_: own(hidden_states, cache_params)
    ),
    "past_key_values": lambda own: (
        lambda hidden_states, past_key_values=None, **_: own(hidden_states, past_key_values)
    ),
}


@pytest.mark.parametrize("name", recurrent.CACHE_NAMES)
def test_a_layer_is_given_states_by_whatever_name_it_has_for_its_cache(name):
    """transformers 5.24 renamed the argument; a layer that got none would begin each segment in no state."""
    model = build("qwen3_5")
    expected = reference.loss(model, uneven()).item()
    for mixer in recurrent.mixers(decoder_of(model)):
        mixer.forward = BY_NAME[name](mixer.forward)
    assert yx.loss(model, uneven()).value.item() == pytest.approx(expected, rel=1e-5)
    assert not sharing_of(model).reason


def mean_by_log_probs(model, data):
    return -yx.log_probs(model, yx.Targets.of(data)).sums().sum() / 7


@pytest.mark.parametrize("of", [lambda *a: yx.loss(*a).value, mean_by_log_probs], ids=["loss", "log_probs"])
def test_weights_that_change_with_the_mode_are_those_of_training(of):
    """RWKV divides weights in place when it is evaluated: what is measured of a model comes before its forward pass."""
    config = transformers.RwkvConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=3,
        rescale_every=1,
        context_length=64,
    )
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config).train()
    slow = copy.deepcopy(model)
    data = [Sequence([5, 6, 7, 8], [0, 1, 1, 1]), Sequence([5, 6, 9, 10, 11], [0, 1, 1, 1, 1])]
    of(model, data).backward()
    expected = reference.loss(slow.train(), data)
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), slow.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-7, name
