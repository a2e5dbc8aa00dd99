"""Families, small and random: over a forest every log p and every gradient is that of the sequences alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from tiny import VOCAB, llama, score_sequences
from transformers import AutoModelForCausalLM
from trees import assert_same, distances, gradients, tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import ModelError
from ygivenx.models import families, sharing
from ygivenx.models.families import decoder_of
from ygivenx.models.model import head_of, hidden_states
from ygivenx.models.sharing import explain, sharing_of
from ygivenx.models.streaming import ONE_PASS
from ygivenx.models.unshared import UnsharedRun
from ygivenx.scores.node_log_probs import node_log_probs
from ygivenx.scores.requests import pair_of_ids
from ygivenx.scores.scoring import context_window

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
UNSHARED = ({}, {"chunk": 37}, {"route": "unshared"})


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


def without_the_last(model, rows) -> torch.Tensor:
    """The mean loss where no row's last token is read, for models to which one more position makes a difference."""
    total = torch.zeros((), dtype=torch.float64)
    for s in rows:
        ids, weights = torch.from_numpy(s.ids.copy()), torch.from_numpy(s.weights[1:].copy()).double()
        log_p = model(ids[None, :-1], use_cache=False).logits[0].double().log_softmax(-1)
        total = total - (weights * log_p.gather(1, ids[1:, None])[:, 0]).sum()
    return total / sum(float(s.weights.sum()) for s in rows)


def assert_exact(model, rows, *several, definition=reference.loss, **options) -> None:
    """The loss and all gradients are those of the model's own runs of single sequences."""
    expected = definition(model, rows)
    wanted = gradients(model, expected)
    for each in several or (options,):
        out = yx.loss(model, rows, **each)
        assert out.value.item() == pytest.approx(expected.item(), rel=1e-5), each
        assert_same(gradients(model, out.value), wanted)


@pytest.mark.parametrize("case", CASES)
def test_shared_equals_alone(case):
    assert_exact(build(case), tree(2), *OUR_ROUTES)


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


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_the_limit_of_a_rotary_embedding_is_exact(monkeypatch, kind):
    """24 read tokens and 12 have one embedding, 25 and 12 two. A row's last token isn't read."""
    monkeypatch.setitem(CASES, kind, BY_LENGTH[kind])
    model, rng = build(kind), np.random.default_rng(0)
    short, at, over = (yx.Sequence(rng.integers(0, VOCAB, n), np.arange(n) > 0) for n in (13, 25, 26))
    assert_exact(model, [short, at], definition=without_the_last)
    for rows in ([short, over], [at, over]):
        with pytest.raises(ModelError, match="changes beyond 24 tokens"):
            yx.loss(model, rows)


POSITIONS = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20}),
    "opt": ("OPT", {"ffn_dim": 48, "max_position_embeddings": 20, "word_embed_proj_dim": 32}),
    "gptj": (
        "GPTJ",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 20, "rotary_dim": 4},
    ),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_rows_beyond_the_learned_positions_are_refused(monkeypatch, case):
    monkeypatch.setitem(CASES, case, POSITIONS[case])
    model, rng = build(case), np.random.default_rng(0)
    at, over = (yx.Sequence(rng.integers(0, VOCAB, n), np.arange(n) > 0) for n in (21, 22))
    assert_exact(model, [at], definition=without_the_last)
    for use in (yx.loss, lambda m, r: node_log_probs(m, yx.Forest.of(r)), score_sequences):
        with pytest.raises(ModelError, match="it has 20 positions, and a sequence of 22 tokens needs 21"):
            use(model, [at, over])


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
def test_windows_that_only_the_mask_knows_are_kept(monkeypatch, name, extra):
    """The comparison on first use is of 17 tokens, fewer than the window: it is made again with a smaller one."""
    monkeypatch.setitem(CASES, name, (name, {**extra, "sliding_window": 30}))
    model, rows = build(name), tree(2)
    assert max(map(len, rows)) > 31
    assert_exact(model, rows, *OUR_ROUTES)
    assert model.config.sliding_window == 30


def test_windows_that_cant_be_kept_are_kept_by_running_sequences_unshared(monkeypatch):
    monkeypatch.setattr(sharing, "_window_is_kept", lambda *_: False)
    monkeypatch.setitem(CASES, "phimoe", ("Phimoe", {"num_local_experts": 4, "sliding_window": 30}))
    model, rows = build("phimoe"), tree(2)
    assert_exact(model, [r for r in rows if len(r.ids) <= 30], route="dense")
    assert_exact(model, rows)
    with pytest.raises(
        ModelError, match="can't be used: its sliding window of 30 tokens stands in its own mask"
    ):
        yx.loss(model, rows, route="dense")


def test_indexers_are_exact_while_they_take_all_keys_and_refused_beyond(monkeypatch):
    """In transformers 5.23 an indexer chooses among later keys, too: a padded sequence gets other logits."""
    sizes = {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "index_topk": 24,
    }  # fmt: skip
    monkeypatch.setitem(CASES, "deepseek_v32", ("DeepseekV32", sizes))
    model, rng = build("deepseek_v32"), np.random.default_rng(0)
    at, short, over = (yx.Sequence(rng.integers(0, VOCAB, n), np.arange(n) > 0) for n in (25, 12, 26))
    assert_exact(model, [at, short], definition=without_the_last)
    for route in ("auto", "unshared"):
        with pytest.raises(
            ModelError, match="its indexers choose 24 keys, and a sequence of 26 tokens needs 25"
        ):
            yx.loss(model, [short, over], route=route)


def test_chunks_by_position_are_kept(monkeypatch):
    chunks = {
        "layer_types": ["chunked_attention"] * 2 + ["full_attention"],
        "attention_chunk_size": 8,
        "head_dim": 8,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    monkeypatch.setitem(CASES, "llama4", ("Llama4Text", chunks | experts))
    assert_exact(build("llama4"), tree(2), *OUR_ROUTES)


@pytest.mark.parametrize("name", ["GPTJ", "StableLm", "Nemotron"])
def test_attention_by_hand_is_given_the_forests_mask(monkeypatch, name):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4} if name == "GPTJ" else {}
    monkeypatch.setitem(CASES, name, (name, sizes))
    model, rows = build(name), tree(2)
    assert_exact(model, rows, {}, {"route": "dense"}, {"chunk": 37})
    assert not sharing_of(model).reason
    for options in ({"route": "blocks"}, {"route": "dense", "chunk": 37}):
        with pytest.raises(ModelError, match="written by hand"):
            yx.loss(model, rows, **options)


def test_what_a_model_does_before_its_head_is_done(monkeypatch):
    monkeypatch.setitem(CASES, "modernbert", ("ModernBertDecoder", {"local_attention": 12, "sep_token_id": 3,
                                                                    "cls_token_id": 4}))  # fmt: skip
    assert_exact(build("modernbert"), tree(2), {}, {"chunk": 37}, {"route": "unshared"})


def test_layers_that_attend_twice_share_at_once_but_not_in_chunks(monkeypatch):
    monkeypatch.setitem(CASES, "diffllama", ("DiffLlama", {}))
    model, rows = build("diffllama"), tree(2)
    assert_exact(model, rows, route="blocks")
    assert_exact(model, rows, chunk=37)
    with pytest.raises(ModelError, match="attend twice"):
        yx.loss(model, rows, chunk=37, route="blocks")


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
    assert "over a small forest its hidden states differ" in sharing_of(doge).reason
    assert {p.dtype for p in doge.parameters()} == {dtype}
    assert not sharing_of(granite).reason
    assert {n: p.data_ptr() for n, p in granite.named_parameters()} == before


@torch.no_grad()
def test_autocast_doesnt_make_a_sound_family_differ():
    model = build("granite")
    with torch.autocast("cpu", torch.bfloat16):
        assert not sharing_of(model).reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_the_logits_near_one_is_found(monkeypatch, dtype):
    monkeypatch.setitem(CASES, "scaled", ("Granite", {"logits_scaling": 1.1}))
    assert head_of(build("scaled").to(dtype)).scale == pytest.approx(1 / 1.1)


def test_all_proven_families_are_proven_here():
    """And those that were never proven, and are compared on first use, work all the same."""
    assert {build(case).config.model_type for case in CASES} == families.PROVEN | {"granite", "cohere"}


# Why their sequences can't share, of the first in chunks alone; all of them are exact by themselves.
STATES = {
    "mamba": ("Mamba", {"state_size": 4}, "begin with no state"),
    "zaya": ("Zaya", {"num_experts_per_tok": 1, "num_experts": 4, "head_dim": 8}, "hybrid"),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, "no positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_what_cant_share_is_run_unshared_and_says_so_once(case, monkeypatch, caplog):
    name, extra, reason = STATES[case]
    monkeypatch.setitem(CASES, case, (name, extra))
    model, rows = build(case), tree(2)
    with caplog.at_level("WARNING", "ygivenx"):
        assert_exact(model, rows, *(UNSHARED if case != "mamba" else UNSHARED[1:]))
    (record,) = (r for r in caplog.records if r.name.startswith("ygivenx"))
    assert reason in record.message
    assert "share nothing" in record.message
    assert case == "mamba" or reason in explain(model)["why"]
    with pytest.raises(ModelError, match="the route 'dense' can't be used"):
        yx.loss(model, rows, route="dense", chunk=37)


def test_unshared_batches_are_of_similar_length_and_hold_each_node_once():
    rows = [
        yx.Sequence(np.arange(i, i + n), np.arange(n) > 0) for i, n in enumerate((40, 39, 12, 35, 10, 41))
    ]
    forest, model = yx.Forest.of(rows), llama()
    run = UnsharedRun.of(model, decoder_of(model), forest, size=100)
    assert [b.ids.shape for b in run.chunks] == [(2, 40), (2, 38), (2, 11)]
    assert sorted(run.order) == list(range(len(forest.fed)))
    (together,) = UnsharedRun.of(model, decoder_of(model), forest, size=ONE_PASS).chunks
    assert together.ids.shape == (6, 40)


def test_dropout_is_drawn_again_as_it_was_where_nothing_is_shared():
    """The second pass over each batch must see the first one's draw: gradients of one seed are the same twice."""
    model, forest = llama(attention_dropout=0.5).train(), yx.Forest.of(tree(2))

    def made(through) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        return gradients(model, through())

    direction = torch.randn(len(forest.fed), 32)
    at_once, again = (
        made(
            lambda chunk=chunk: (
                hidden_states(model, forest, route="unshared", chunk=chunk) * direction
            ).sum()
        )
        for chunk in (10**6, 45)
    )
    assert at_once.keys() == again.keys()
    value = made(lambda: yx.loss(model, forest, route="unshared", chunk=45).value)
    assert_same(made(lambda: yx.loss(model, forest, route="unshared", chunk=45).value), value, 1e-6)


def test_a_family_that_nobody_proved_is_compared_first(monkeypatch):
    monkeypatch.setattr(sharing, "PROVEN", frozenset())
    compared = []
    difference = sharing._difference
    monkeypatch.setattr(sharing, "_difference", lambda *a: compared.append(a) or difference(*a))
    model = llama().train()
    hidden_states(model, yx.Forest.of(tree(0)))
    ((ours, exact),) = compared
    assert ours.gradient.shape == exact.gradient.shape
    assert model.training
    hidden_states(model, yx.Forest.of(tree(1)))
    assert len(compared) == 1, "once per model is enough"


def mean_of_all_before(module, inputs, output):
    """A layer that knows nothing of branches, but doesn't look ahead."""
    return output + output.cumsum(1) / torch.arange(1, output.shape[1] + 1)[None, :, None]


def mean_of_all(module, inputs, output):
    return output + output.mean(1, keepdim=True)


def test_a_layer_that_mixes_branches_is_run_unshared(monkeypatch):
    monkeypatch.setattr(sharing, "PROVEN", frozenset())
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(mean_of_all_before)
    assert "over a small forest its hidden states differ" in sharing_of(model).reason
    assert_exact(model, tree(0), *UNSHARED)


def test_a_layer_that_looks_ahead_is_refused(monkeypatch):
    monkeypatch.setattr(sharing, "PROVEN", frozenset())
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(mean_of_all)
    with pytest.raises(ModelError, match="in a padded batch its hidden states differ"):
        hidden_states(model, yx.Forest.of(tree(0)))


def test_gradients_that_mix_branches_are_found_where_hidden_states_are_right(monkeypatch):
    monkeypatch.setattr(sharing, "PROVEN", frozenset())
    model = llama()

    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + grad.mean(1, keepdim=True)

    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: Mixed.apply(output))
    with pytest.raises(ModelError, match="in a padded batch its gradients differ"):
        sharing_of(model)


def test_errors_of_other_libraries_are_ours(monkeypatch):
    monkeypatch.setattr(sharing, "PROVEN", frozenset())
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output[:, :0])
    with pytest.raises(ModelError, match="it can't read a sequence: RuntimeError"):
        hidden_states(model, yx.Forest.of(tree(0)))


def test_a_model_whose_own_forward_fails_says_so():
    """transformers 5.23: with return_dict=False this family's head asks a tuple for hidden states."""
    model = build("granite")
    model.config.return_dict = False
    with pytest.raises(ModelError, match="its own forward fails with AttributeError"):
        yx.loss(model, tree(2))


def test_an_encoder_with_a_decoder_is_refused():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ModelError, match="is an encoder with a decoder"):
        hidden_states(transformers.T5ForConditionalGeneration(config), yx.Forest.of(tree(0)))


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


def test_odd_configs_are_exact():
    plain, odd = llama(), llama(attn_implementation="eager")
    odd.config.return_dict, odd.config.output_hidden_states, odd.config.pad_token_id = False, True, None
    assert yx.loss(odd, tree(2)).value.item() == pytest.approx(yx.loss(plain, tree(2)).value.item(), rel=1e-5)
    assert yx.loss(llama(num_hidden_layers=0), tree(2)).value.isfinite()


def test_a_model_without_weights_is_refused():
    with pytest.raises(ModelError, match="on the device `meta`"):
        yx.loss(llama().to("meta"), tree(2))


def test_what_is_no_causal_model_is_refused():
    with pytest.raises(ModelError, match="Linear has no decoder"):
        hidden_states(torch.nn.Linear(2, 2), yx.Forest.of(tree(0)))
    with pytest.raises(ModelError, match="Linear has no language-model head"):
        head_of(torch.nn.Linear(2, 2))


def test_a_head_that_does_more_than_a_product_is_refused(monkeypatch):
    model = llama()
    monkeypatch.setattr("ygivenx.models.logits.PROVEN", frozenset())
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


@pytest.mark.full
@pytest.mark.model
def test_the_real_model(smol):
    """No further from float64 than the sequences one by one are.

    The gradient of one norm nearly cancels here: by the machine, either way may be off by 7e-5.
    """
    model = copy.deepcopy(smol[0])
    rows = tree(7, count=3, low=8, high=16)
    ours = [gradients(model, yx.loss(model, rows, chunk=c).value) for c in (None, 11)]
    apart = gradients(model, reference.loss(model, rows))
    exact = gradients(model.double(), reference.loss(model, rows))
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
