"""Families, small and random: over a forest every log p and every gradient is that of the sequences alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from tiny import VOCAB, llama
from transformers import AutoModelForCausalLM
from trees import assert_same, distances, gradients, tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import ModelError
from ygivenx.models import families
from ygivenx.models.model import head_of, hidden_states
from ygivenx.scores.node_log_probs import node_log_probs
from ygivenx.scores.requests import pair_of_ids
from ygivenx.scores.scoring import context_window, score_sequences

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral with windows": ("Mistral", {"sliding_window": 5}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                          "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 8}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 6}),
    "smollm3": ("SmolLM3", {}),
    # Not in PROVEN, so that each model is compared first: they scale their logits, one by division.
    "granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
}  # fmt: skip
OUR_ROUTES = ({"route": "blocks"}, {"route": "dense"}, {"route": "blocks", "chunk": 37})


def build(case: str, wide: bool = False):
    """wide: heads of 16 numbers, not 8."""
    name, extra = CASES[case]
    base = {
        k: v
        for k, v in COMMON.items()
        if name != "GPT2" or not k.startswith(("hidden", "inter", "num_", "max_"))
    }
    settings = base | extra
    if wide:
        settings |= {k: 64 for k in ("hidden_size", "n_embd") if k in settings}
        settings |= {k: 16 for k in ("head_dim", "query_pre_attn_scalar") if k in settings}
    config = getattr(transformers, name + "Config")(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for n, p in model.named_parameters():  # norms of one and biases of zero would hide mistakes
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=float("norm" in n and "gemma" not in case), std=0.2)
    return model


@pytest.mark.parametrize("case", CASES)
def test_shared_equals_alone(case):
    model, rows = build(case), tree(2)
    expected = reference.loss(model, rows)
    wanted = gradients(model, expected)
    for options in OUR_ROUTES:
        out = yx.loss(model, rows, **options)
        assert out.value.item() == pytest.approx(expected.item(), rel=1e-5), options
        assert_same(gradients(model, out.value), wanted)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_flex_scores_every_family(case):
    model, rows = build(case), tree(2)
    flex, blocks = (yx.loss(model, rows, route=r).value.item() for r in ("flex", "blocks"))
    assert flex == pytest.approx(blocks, rel=1e-5)


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 24, "factor": 4.0}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
BY_LENGTH = {
    "longrope": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24, "sliding_window": None},
    ),
    "dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
}


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("options", OUR_ROUTES)
def test_positions_that_depend_on_the_length_are_refused_where_sequences_differ(monkeypatch, kind, options):
    monkeypatch.setitem(CASES, kind, BY_LENGTH[kind])
    model, rows = build(kind), tree(2)
    with pytest.raises(ModelError, match=rf"\({kind}\) changes beyond 24 tokens"):
        yx.loss(model, rows, **options)
    with pytest.raises(ModelError, match="changes beyond 24 tokens"):
        node_log_probs(model, yx.Forest.of(rows))


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("longrope", 3, 12), ("dynamic", 3, 12), ("longrope", 26, 40)]
)
def test_positions_that_depend_on_the_length_are_exact_on_one_side_of_it(monkeypatch, kind, low, high):
    monkeypatch.setitem(CASES, kind, BY_LENGTH[kind])
    model, rows = build(kind), [r for r in tree(2, low=low, high=high) if (len(r.ids) > 25) == (low > 24)]
    assert len(rows) > 2
    expected = reference.loss(model, rows)
    wanted = gradients(model, expected)
    out = yx.loss(model, rows)
    assert out.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, out.value), wanted)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        (
            "Qwen2Moe",
            {**EXPERTS, "use_sliding_window": True, "max_window_layers": 2},
        ),  # proven without windows
        ("Phimoe", {"num_local_experts": 4}),
    ],
)
def test_windows_that_only_the_mask_knows_are_refused(monkeypatch, name, extra):
    """The comparison on first use is of 17 tokens, fewer than the window."""
    monkeypatch.setitem(CASES, name, (name, {**extra, "sliding_window": 30}))
    model, rows = build(name), tree(2)
    short = [r for r in rows if len(r.ids) <= 30]
    assert len(short) > 2
    assert yx.loss(model, short).value.item() == pytest.approx(reference.loss(model, short).item(), rel=1e-5)
    for options in OUR_ROUTES:
        with pytest.raises(ModelError, match="sliding window of 30 tokens can't be kept"):
            yx.loss(model, rows, **options)


def test_layers_that_attend_twice_are_computed_whole_and_refused_in_chunks(monkeypatch):
    monkeypatch.setitem(CASES, "diffllama", ("DiffLlama", {}))
    model, rows = build("diffllama"), tree(2)
    expected = reference.loss(model, rows)
    wanted = gradients(model, expected)
    out = yx.loss(model, rows)
    assert out.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, out.value), wanted)
    with torch.no_grad():
        node_log_probs(model, yx.Forest.of(rows))
    with pytest.raises(ModelError, match="attend twice"):
        yx.loss(model, rows, chunk=37)


def test_layers_of_several_widths_and_with_shared_keys_are_exact(monkeypatch):
    """Gemma 3n's config has a list of widths; its last layers take the keys and values of earlier ones."""
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    layers |= {
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
        "num_kv_shared_layers": 2,
    }
    narrow = {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
        "head_dim": 8,
    }
    monkeypatch.setitem(CASES, "gemma3n", ("Gemma3nText", {**layers, **narrow, "sliding_window": 6}))
    model, rows = build("gemma3n"), tree(2)
    expected = reference.loss(model, rows)
    wanted = gradients(model, expected)
    for options in ({}, *OUR_ROUTES):
        out = yx.loss(model, rows, **options)
        assert out.value.item() == pytest.approx(expected.item(), rel=1e-5), options
        assert_same(gradients(model, out.value), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_layer_that_mixes_branches(monkeypatch, dtype):
    """Rounding in bfloat16 is as large as what Doge's own mask does; weights are left as they were."""
    monkeypatch.setitem(CASES, "doge", ("Doge", {}))
    doge, granite = (build(name).to(dtype) for name in ("doge", "granite"))
    before = {n: p.data_ptr() for n, p in granite.named_parameters()}
    with pytest.raises(ModelError, match="over a small forest its hidden states differ"):
        families.check(doge)
    assert {p.dtype for p in doge.parameters()} == {dtype}
    families.check(granite)
    assert {n: p.data_ptr() for n, p in granite.named_parameters()} == before


@torch.no_grad()
def test_autocast_doesnt_make_a_sound_family_differ():
    model = build("granite")
    with torch.autocast("cpu", torch.bfloat16):
        families.check(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_the_logits_near_one_is_found(monkeypatch, dtype):
    monkeypatch.setitem(CASES, "scaled", ("Granite", {"logits_scaling": 1.1}))
    assert head_of(build("scaled").to(dtype)).scale == pytest.approx(1 / 1.1)


def test_all_proven_families_are_proven_here():
    """And those that were never proven, and are compared on first use, work all the same."""
    assert {build(case).config.model_type for case in CASES} == families.PROVEN | {"granite", "cohere"}


@pytest.mark.parametrize(
    ("name", "extra", "layers"),
    [
        ("Qwen3Next", {"layer_types": ["linear_attention"] * 2 + ["full_attention"], **EXPERTS}, "linear_attention"),
        ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
        ("Llama4Text", {"layer_types": ["chunked_attention"] * 2 + ["full_attention"]}, "chunked_attention"),
    ],
)  # fmt: skip
def test_layers_with_a_state_are_refused_by_name(name, extra, layers):
    config = getattr(transformers, name + "Config")(**COMMON | extra)

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config

        def get_decoder(self):
            return self

        def get_input_embeddings(self):
            return None

    with pytest.raises(ModelError, match=f"layers of type {layers}"):
        families.check(Named())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4),
            "linear_attention",
        ),
        (
            transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2),
            "takes no positions",
        ),
    ],
)
def test_models_without_positions_are_refused_before_the_first_step(config, reason):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=reason):
        hidden_states(model, yx.Forest.of(tree(0)))


def test_a_family_that_nobody_proved_is_compared_first(monkeypatch):
    monkeypatch.setattr(families, "PROVEN", frozenset())
    compared = []
    refuse = families._refuse_difference
    monkeypatch.setattr(families, "_refuse_difference", lambda *a: (compared.append(1), refuse(*a)))
    model = llama().train()
    hidden_states(model, yx.Forest.of(tree(0)))
    assert len(compared) == 3
    assert model.training
    hidden_states(model, yx.Forest.of(tree(1)))
    assert len(compared) == 3, "once per model is enough"


def test_a_family_that_mixes_branches_is_refused(monkeypatch):
    """The guard trips: a layer that adds the mean of all tokens before knows nothing of branches."""
    monkeypatch.setattr(families, "PROVEN", frozenset())
    model = llama()

    def mix(module, inputs, output):
        steps = torch.arange(1, output.shape[1] + 1)[None, :, None]
        return output + output.cumsum(1) / steps

    model.model.layers[0].mlp.register_forward_hook(mix)
    with pytest.raises(ModelError, match="over a small forest its hidden states differ"):
        hidden_states(model, yx.Forest.of(tree(0)))


def test_layers_that_pass_by_the_interface_are_refused():
    model = llama()
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ModelError, match="1 of its 2 layers use transformers' attention interface"):
        hidden_states(model, yx.Forest.of(tree(0)))


@pytest.mark.parametrize("at", [3, -1])
def test_ids_without_an_embedding_are_refused(at):
    """As a context, and as the last token, which is only asked for."""
    ids = np.arange(6)
    ids[at] = VOCAB
    with pytest.raises(
        ModelError, match=f"{VOCAB} has no embedding: there are {VOCAB}|outside 0..{VOCAB - 1}"
    ):
        yx.loss(llama(), [yx.Sequence(ids, np.array([0, 0, 0, 1, 1, 1]))])


def test_what_is_no_causal_model_is_refused():
    with pytest.raises(ModelError, match="Linear has no decoder"):
        hidden_states(torch.nn.Linear(2, 2), yx.Forest.of(tree(0)))
    with pytest.raises(ModelError, match="Linear has no language-model head"):
        head_of(torch.nn.Linear(2, 2))


def test_a_head_that_does_more_than_a_product_is_refused(monkeypatch):
    model = llama()
    monkeypatch.setattr("ygivenx.models.model.PROVEN", frozenset())
    product = model.lm_head.forward
    monkeypatch.setattr(
        model.lm_head, "forward", lambda h: product(h) - product(h).mean(-1, keepdim=True) * 2
    )
    with pytest.raises(ModelError, match="aren't its head's product"):
        head_of(model)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft 0.21 asks by the old name
@pytest.mark.parametrize("chunk", [None, 37])
def test_adapters(chunk):
    """LoRA: only the adapters get gradients, and the same ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    rows = tree(3)
    wanted = gradients(model, reference.loss(model, rows))
    assert wanted
    assert all("lora" in name for name in wanted)
    assert_same(gradients(model, yx.loss(model, rows, chunk=chunk).value), wanted)


@pytest.mark.model
def test_the_real_model(smol):
    """No further from float64 than the sequences one by one are.

    In tree(7) the gradient of one norm nearly cancels: by the machine, either way may be off by 7e-5 there.
    """
    model = copy.deepcopy(smol[0])
    for seed in (7, 9):
        rows = tree(seed, count=4, low=8, high=24)
        ours = [gradients(model, yx.loss(model, rows, chunk=c).value) for c in (None, 37)]
        apart = gradients(model, reference.loss(model, rows))
        exact = gradients(model.double(), reference.loss(model, rows))
        model.float()
        for made in ours:
            ours_off, apart_off = distances(made, exact), distances(apart, exact)
            assert np.median(ours_off) <= 1.25 * np.median(apart_off)
            assert max(ours_off) <= max(3e-5, 3 * max(apart_off))


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_scores_of_texts_that_the_same_frequencies_read(monkeypatch, kind):
    """A long text would change how a short one beside it is read."""
    monkeypatch.setitem(CASES, kind, BY_LENGTH[kind])
    model, rng = build(kind), np.random.default_rng(0)
    short, fits, long = (rng.integers(1, VOCAB, n) for n in (20, 25, 80))
    texts = [pair_of_ids(ids[:-3], ids[-3:]) for ids in (short, fits, long)]
    alone_too = [long] if kind == "longrope" else []
    told = score_sequences(model, texts[:2]) + [
        s for _ in alone_too for s in score_sequences(model, texts[2:])
    ]
    for ids, score in zip((short, fits, *alone_too), told, strict=True):
        with torch.no_grad():
            log_p = (
                model(torch.from_numpy(ids[None, :-1]), use_cache=False).logits[0].double().log_softmax(-1)
            )
        expected = log_p.gather(1, torch.from_numpy(ids[1:, None]))[-3:].sum()
        assert score.log_p_y_given_x == pytest.approx(float(expected), abs=1e-4)
    for together, options in ((texts, {}), (texts[2:], {"chunk": 40})):
        with pytest.raises(ModelError, match="changes beyond 24 tokens") as refused:
            score_sequences(model, together, **options)
        assert "max_length=24" in refused.value.fix
    assert context_window(model) == 24
