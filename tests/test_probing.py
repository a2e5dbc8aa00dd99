"""The probe recovers weights that we chose, from losses that we didn't write."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from ygivenx.errors import LossError, ModelError
from ygivenx.proof.gradients import FOREIGN_TERM
from ygivenx.proof.leaks import leakage
from ygivenx.proof.probing import RELATIVE_ERROR, probe
from ygivenx.proof.wrapping import unwrap

VOCAB = 300


def tiny(dtype=torch.float32, *, sharpness=0.2, tie=True, seed=0, **config):
    """A random Llama; `sharpness` is the spread of its weights: 1.0 makes it very sure of itself."""
    torch.manual_seed(seed)
    made = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        initializer_range=sharpness,
        **config,
    )
    return LlamaForCausalLM(made).to(dtype).train()


def batch(rows=3, length=18, seed=1, share=0.5):
    """ids int64 [B, T] and float weights [B, T], some 0, the first column always."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    weights = torch.rand(rows, length, generator=generator) + 0.05
    weights *= torch.rand(rows, length, generator=generator) < share
    weights[:, 0] = 0
    return ids, weights


def weighted(logits, ids, weights):
    """Σ w·(−log p) in plain torch: what the probe has to read back."""
    log_p = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return -(log_p * weights[:, 1:]).sum()


def assert_recovered(probed, ids, weights, *, micro_batch=0, scale=1.0, bound=None):
    """Targets equal, weights within the stated bound, and nothing else trained."""
    bound = RELATIVE_ERROR[next(probed.model.parameters()).dtype] if bound is None else bound
    rows = {(r.sequence, r.position): r for r in probed.trained() if r.micro_batch == micro_batch}
    true = {(b, i): float(w) for (b, i), w in np.ndenumerate(np.asarray(weights)) if w}
    assert rows.keys() == true.keys()
    for place, w in true.items():
        assert rows[place].target == int(ids[place])
        assert rows[place].weight == pytest.approx(w * scale, rel=bound)


class Own(torch.nn.Module):
    """A language model that isn't transformers'."""

    def __init__(self):
        super().__init__()
        self.embed, self.to_logits = torch.nn.Embedding(VOCAB, 32), torch.nn.Linear(32, VOCAB)

    def forward(self, tokens):
        return self.to_logits(self.embed(tokens).tanh())


def test_any_model_is_probed_by_its_head():
    model = Own()
    ids, weights = batch()
    with pytest.raises(ModelError, match="no output embeddings"):
        probe(model)
    with probe(model, head=model.to_logits) as probed:
        weighted(model(ids), ids, weights).backward()
    assert_recovered(probed, ids, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_float_weights_come_back(dtype, sharpness, route):
    model = tiny(dtype, sharpness=sharpness)
    ids, weights = batch()
    with probe(model) as probed:
        if route == "logits":
            logits = model(input_ids=ids).logits
        else:  # a fused loss: the head's module is never called
            logits = model.model(input_ids=ids).last_hidden_state @ model.lm_head.weight.T
        weighted(logits.float(), ids, weights).backward()
    assert_recovered(probed, ids, weights)
    assert probed.weight_sum == pytest.approx(float(weights.sum()), rel=RELATIVE_ERROR[dtype])
    assert probed.weighting == "varied"
    assert probed.smoothing == 0


def test_a_trained_model_that_is_sure_of_its_tokens():
    """p up to 0.9999: where 1 − p cancels in float32, the other tokens still tell the weight."""
    model = tiny()
    ids, weights = batch(rows=1, share=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with probe(model) as probed:
        weighted(model(input_ids=ids).logits, ids, weights).backward()
    assert max(r.log_p for r in probed.trained()) > math.log(0.999)
    assert_recovered(probed, ids, weights)


def test_the_loss_of_transformers_itself():
    model = tiny()
    ids, weights = batch()
    labels = torch.where(weights > 0, ids, -100)
    with probe(model) as probed:
        model(input_ids=ids, labels=labels).loss.backward()
    assert_recovered(probed, ids, (weights > 0).float(), scale=1 / int((weights > 0).sum()))
    assert probed.weighting == "uniform"
    assert probed.weight_sum == pytest.approx(1, rel=1e-5)


def test_the_model_is_left_as_it_was():
    model, twin = tiny(), tiny()
    ids, weights = batch()
    with probe(model) as probed:
        weighted(model(input_ids=ids).logits, ids, weights).backward()
    weighted(twin(input_ids=ids).logits, ids, weights).backward()
    assert probed.trained()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert not any(m._forward_hooks for m in model.modules())


def test_accumulation_is_told_apart_by_micro_batch():
    model = tiny()
    parts = [batch(seed=1), batch(rows=1, length=7, seed=2)]
    with probe(model) as probed:
        for ids, weights in parts:
            (weighted(model(input_ids=ids).logits, ids, weights) / 2).backward()
    for i, (ids, weights) in enumerate(parts):
        assert_recovered(probed, ids, weights, micro_batch=i, scale=0.5)
        assert probed.micro_batches[i].weight_sum == pytest.approx(float(weights.sum()) / 2, rel=1e-4)


def test_label_smoothing_is_named():
    model = tiny(sharpness=1.0)
    ids, _ = batch()
    with probe(model) as probed:
        logits = model(input_ids=ids).logits[:, :-1].reshape(-1, VOCAB)
        cross_entropy(logits, ids[:, 1:].reshape(-1), label_smoothing=0.1, reduction="sum").backward()
    every = torch.ones_like(ids, dtype=torch.float)
    every[:, 0] = 0
    assert probed.smoothing == pytest.approx(0.1, rel=1e-4)
    assert_recovered(probed, ids, every)


def test_weights_that_depend_on_p_are_named():
    model = tiny(sharpness=1.0)
    ids, _ = batch(rows=1, length=30)
    with probe(model) as probed:
        log_p = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
        (-log_p * log_p.exp().detach()).sum().backward()  # dynamic fine-tuning
    assert probed.weighting == "probability"


def test_negative_weights_and_several_targets_of_one_row():
    model = tiny()
    ids, _ = batch(rows=1)
    for fused in (False, True):
        with probe(model) as probed:
            hidden = model.model(input_ids=ids).last_hidden_state
            logits = hidden @ model.lm_head.weight.T if fused else model.lm_head(hidden)
            log_p = logits[0, 4].log_softmax(-1)
            (-2.0 * log_p[7] - 0.5 * log_p[9] + 0.75 * log_p[11]).backward()
        rows = {r.target: r.weight for r in probed.trained()}
        assert rows == pytest.approx({7: 2.0, 9: 0.5, 11: -0.75}, rel=1e-4)
        assert {r.position for r in probed.trained()} == {5}


def test_a_shift_by_one_shows_in_the_targets():
    model = tiny()
    ids, _ = batch()
    with probe(model) as probed:  # labels not shifted: each token is trained to repeat itself
        logits = model(input_ids=ids).logits
        cross_entropy(logits.reshape(-1, VOCAB), ids.reshape(-1)).backward()
    assert all(r.target == r.input_id for r in probed.trained())


@pytest.mark.parametrize("how", ["keep", "in_place", "gathered", "chunks"])
def test_logits_that_were_sliced_scaled_or_chunked(how):
    model = tiny()
    ids, weights = batch()
    weights[:, :-5] = 0
    with probe(model) as probed:
        if how == "keep":
            logits = model(input_ids=ids, logits_to_keep=6).logits
            loss = weighted(logits, ids[:, -6:], weights[:, -6:])
        elif how == "in_place":
            logits = model(input_ids=ids).logits
            loss = weighted(logits.mul_(1.0), ids, weights)
        else:
            hidden = model.model(input_ids=ids).last_hidden_state
            rows = (weights[:, 1:] > 0).nonzero(as_tuple=True)
            picked, targets, w = hidden[:, :-1][rows], ids[:, 1:][rows], weights[:, 1:][rows]
            parts = picked.split(4) if how == "chunks" else [picked]
            log_p = torch.cat([model.lm_head(x).log_softmax(-1) for x in parts])
            loss = -(log_p[range(len(w)), targets] * w).sum()
        loss.backward()
    assert_recovered(probed, ids, weights)


@pytest.mark.parametrize("fused", [False, True])
def test_soft_capped_logits(fused):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.5,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).train()
    ids, weights = batch()
    with probe(model) as probed:
        if fused:
            raw = model.model(input_ids=ids).last_hidden_state @ model.lm_head.weight.T
            logits = 5 * torch.tanh(raw / 5)
        else:
            logits = model(input_ids=ids).logits
        assert logits.abs().max() > 4  # the cap bends these logits
        weighted(logits, ids, weights).backward()
    assert_recovered(probed, ids, weights, bound=1e-3)


def test_padding_is_marked():
    model = tiny()
    ids, weights = batch(rows=2, length=8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with probe(model) as probed:
        logits = model(input_ids=ids, attention_mask=mask).logits
        weighted(logits, ids, torch.ones_like(weights)).backward()
    assert {(r.sequence, r.position) for r in probed.trained() if not r.attended} == {(1, 5), (1, 6), (1, 7)}


def test_an_all_masked_batch_and_a_forgotten_backward():
    model = tiny()
    ids, weights = batch()
    with probe(model) as probed:
        weighted(model(input_ids=ids).logits, ids, weights * 0).backward()
    assert probed.trained() == []
    assert probed.weighting == "none"
    assert len(probed.tokens()) == ids.numel() - len(ids)
    with probe(model) as probed:
        model(input_ids=ids)
    with pytest.raises(LossError, match="no gradient reached"):
        probed.tokens()


def test_a_term_beside_the_cross_entropy_is_reported():
    model = tiny()
    ids, weights = batch()
    with probe(model) as plain:
        weighted(model(input_ids=ids).logits, ids, weights).backward()
    with probe(model) as extra:
        logits = model(input_ids=ids).logits
        (weighted(logits, ids, weights) + 0.5 * logits.logsumexp(-1).pow(2).sum()).backward()
    assert max(r.residual for r in plain.trained()) < 1e-4
    assert max(r.residual for r in extra.trained()) > 0.1


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("term", ["z_loss", "distillation"])
def test_rows_of_another_term_alone_have_no_target(route, term):
    """The term is on every row, the cross-entropy on some: the others aren't trained on any token."""
    model = tiny()
    ids, weights = batch()
    teacher = torch.randn(*ids.shape, VOCAB, generator=torch.Generator().manual_seed(3)).softmax(-1)
    with probe(model) as probed:
        hidden = model.model(input_ids=ids).last_hidden_state
        logits = model.lm_head(hidden) if route == "logits" else hidden @ model.lm_head.weight.T
        if term == "z_loss":
            loss = weighted(logits, ids, weights) + 1e-4 * logits.logsumexp(-1).pow(2).sum()
        else:
            loss = -(teacher * logits.log_softmax(-1)).sum()
        loss.backward()
    if term == "z_loss":
        places = {(r.sequence, r.position): r.target for r in probed.trained()}
        assert places == {(b, i): int(ids[b, i]) for b, i in np.argwhere(weights.numpy())}
    else:
        assert probed.trained() == []
        assert probed.weighting == "none"
    untrained = [f for f in probed.micro_batches[0].found if f.target < 0]
    assert len(untrained) == ids.numel() - len(probed.trained())
    assert min(f.residual for f in untrained) > FOREIGN_TERM


@pytest.mark.parametrize("same", [True, False])
def test_passes_of_one_micro_batch_are_merged(same):
    """The same rows twice (their weights add up), or halves of a batch (rows below each other)."""
    model = tiny()
    (ids, weights), (more, others) = batch(), batch(rows=2, length=11, seed=5)
    with probe(model) as probed:
        with probed.micro_batch():
            pass
        with probed.micro_batch():
            for i, w in [(ids, weights), (ids, weights) if same else (more, others)]:
                weighted(model(input_ids=i).logits, i, w).backward()
    assert [b.ids.shape for b in probed.micro_batches] == [(0, 0), (3 if same else 5, 18)]
    if same:
        assert_recovered(probed, ids, 2 * weights, micro_batch=1)
    else:
        wide = torch.zeros(5, 18), torch.zeros(5, 18, dtype=torch.long)
        for whole, parts in zip(wide, [(weights, others), (ids, more)], strict=True):
            whole[:3], whole[3:, :11] = parts
        assert_recovered(probed, wide[1], wide[0], micro_batch=1)


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_autocast_rounds_and_the_weights_are_read_all_the_same(route):
    model = tiny()
    ids, weights = batch()
    with probe(model) as probed:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids).last_hidden_state
            logits = model.lm_head(hidden) if route == "logits" else hidden @ model.lm_head.weight.T
        weighted(logits.float(), ids, weights).backward()
    assert_recovered(probed, ids, weights, bound=RELATIVE_ERROR[torch.bfloat16])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile, on import
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_was_compiled_before():
    """Its graph knows nothing of hooks: inside the probe it runs as written, afterwards compiled again."""
    model = tiny()
    ids, weights = batch()
    compiled = torch.compile(model, backend="eager")
    weighted(compiled(input_ids=ids).logits, ids, weights).backward()
    with probe(compiled) as probed:
        weighted(compiled(input_ids=ids).logits, ids, weights).backward()
    assert_recovered(probed, ids, weights)


@pytest.mark.parametrize("how", ["DTensor", "ZeRO-3", "FSDP"])
def test_a_sharded_head_is_refused_by_name(tmp_path, how):
    model = tiny(tie=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if how == "DTensor":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        elif how == "ZeRO-3":  # as DeepSpeed leaves a parameter between two passes
            model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
            model.lm_head.weight.ds_id = 0
        else:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flatten())
        hooks = [list(m._forward_hooks) for m in model.modules()]
        with pytest.raises(ModelError, match=how), probe(model):
            pass
        assert hooks == [list(m._forward_hooks) for m in model.modules()]
    finally:
        torch.distributed.destroy_process_group()


def test_what_breaks_in_a_hook_is_raised_at_the_end():
    """Not inside backward, where it would end somebody's run."""
    model = tiny()
    ids, weights = batch()
    reached_the_end = False

    def step():
        nonlocal reached_the_end
        with probe(model) as probed:
            loss = weighted(model(input_ids=ids).logits, ids, weights)
            probed._passes[0].by_logits = np.zeros(1 + ids.numel(), bool)
            loss.backward()
            reached_the_end = True

    with pytest.raises(RuntimeError, match="must match the size"):
        step()
    assert reached_the_end


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # transformers, on PEFT's behalf
@pytest.mark.parametrize("trained", ["adapter", "head"])
def test_peft_and_a_frozen_backbone(trained):
    model = tiny(tie=False)
    if trained == "adapter":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    else:
        model.model.requires_grad_(False)
    ids, weights = batch()
    with probe(model) as probed:
        weighted(model(input_ids=ids).logits, ids, weights).backward()
    assert_recovered(probed, ids, weights)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile, on import
def test_distributed_and_compiled_wrappers_are_seen_through(tmp_path):
    model = tiny()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        ids, weights = batch()
        with probe(wrapped) as probed:
            weighted(wrapped(input_ids=ids).logits, ids, weights).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_recovered(probed, ids, weights)
    assert unwrap(torch.compile(model)) is model


def test_what_trains_nothing_fails_as_it_does_without_the_probe():
    model = tiny().requires_grad_(False)
    ids, weights = batch()
    with probe(model), pytest.raises(RuntimeError, match="does not require grad"):
        weighted(model(input_ids=ids).logits, ids, weights).backward()


def test_several_passes_before_their_heads():
    """Each head's rows belong to the pass whose hidden states they are, not to the last one."""
    model = tiny()
    batches = [batch(seed=seed) for seed in (1, 2)]
    with probe(model) as probed:
        hidden = [model.model(input_ids=ids).last_hidden_state for ids, _ in batches]
        logits = [model.lm_head(h) for h in hidden]
        sum(weighted(z, *b) for z, b in zip(logits, batches, strict=True)).backward()
    for i, (ids, weights) in enumerate(batches):
        assert_recovered(probed, ids, weights, micro_batch=i)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # transformers, on PEFT's behalf
@pytest.mark.parametrize("read", ["module", "base"])
def test_an_adapter_on_the_head_of_a_fused_loss(read):
    """What the head's module gives, and what kernels that take `lm_head.weight` give."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["lm_head"], r=4, lora_dropout=0.1)
    model = peft.get_peft_model(tiny(tie=False), adapter).eval()
    torch.nn.init.normal_(model.get_base_model().lm_head.lora_B["default"].weight)
    ids, weights = batch()
    with probe(model) as probed:
        head = probed.model.lm_head
        hidden = probed.model.model(input_ids=ids).last_hidden_state
        # A gathered part, so that the head's module isn't recognised.
        flat = hidden.flatten(0, 1)[torch.arange(ids.numel())]
        logits = head(flat) if read == "module" else flat @ head.weight.T
        weighted(logits.view(*ids.shape, -1), ids, weights).backward()
    assert_recovered(probed, ids, weights)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="no output embeddings"):
        probe(torch.nn.Linear(2, 2))


def test_our_own_loss_of_a_forest():
    """A branching node has several targets; each edge's weight comes back."""
    from ygivenx import Forest, Sequence, loss

    rng = np.random.default_rng(0)
    stem = rng.integers(0, VOCAB, 6)
    sequences = []
    for _ in range(3):
        ids = np.concatenate([stem, rng.integers(0, VOCAB, 4)])
        weights = np.concatenate([np.zeros(6), rng.uniform(0.5, 2, 4)]).astype(np.float32)
        sequences.append(Sequence(ids, weights))
    model = tiny()
    with probe(model) as probed:
        out = loss(model, Forest.of(sequences))
        out.value.backward()
    total = sum(float(s.weights.sum()) for s in sequences)
    expected = sorted(
        (int(t), w / total) for s in sequences for t, w in zip(s.ids[6:], s.weights[6:], strict=True)
    )
    got = sorted((r.target, r.weight) for r in probed.trained())
    assert [t for t, _ in got] == [t for t, _ in expected]
    assert [w for _, w in got] == pytest.approx([w for _, w in expected], rel=1e-4)


def test_leakage_draws_no_random_number():
    model = tiny(attention_dropout=0.3)
    ids, _ = batch(rows=1, length=12)
    state = torch.get_rng_state()
    leakage(model, {"input_ids": ids}, np.array([[0] * 5 + [1] * 7]))
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("mask", ["isolated", "leaking"])
def test_leakage_between_packed_documents(mask):
    model = tiny(attn_implementation="sdpa")
    ids, _ = batch(rows=1, length=12)
    groups = np.array([[0] * 5 + [1] * 7])
    inputs = {"input_ids": ids}
    if mask == "isolated":
        inputs["position_ids"] = torch.tensor([[*range(5), *range(7)]])
    before = [p.clone() for p in model.parameters()]
    matrix = leakage(model, inputs, groups)
    assert matrix[0, 1] == 0  # causal: the first never sees the second
    assert (matrix[1, 0] == 0) == (mask == "isolated")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


# -- other people's losses, and the real model --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_of_trl(dtype):
    """TRL's chunked log-probabilities, which never call the head's module."""
    utils = pytest.importorskip("trl.trainer.utils")
    model = tiny(dtype)
    utils.add_fused_lm_head(model)
    ids, weights = batch()
    labels = torch.where(weights > 0, ids, -100)
    with probe(model) as probed:
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (-(out.log_probs * weights[:, 1:]).sum()).backward()
    assert_recovered(probed, ids, weights)


@pytest.mark.full  # compiles a kernel
@pytest.mark.filterwarnings("ignore")
def test_cut_cross_entropy():
    cce = pytest.importorskip("cut_cross_entropy")
    model = tiny()
    ids, weights = batch()
    labels = torch.where(weights > 0, ids, -100)
    with probe(model) as probed:
        hidden = model.model(input_ids=ids).last_hidden_state
        loss = cce.linear_cross_entropy(
            hidden, model.lm_head.weight, labels, shift=True, reduction="none", impl="torch_compile"
        )
        (loss * weights[:, 1:]).sum().backward()
    assert_recovered(probed, ids, weights)


def real_batch(tokenizer):
    """A chat in full, so that many of its tokens are all but certain; float weights."""
    messages = [
        {"role": "user", "content": "Name the capital of France, and one river that flows through it."},
        {"role": "assistant", "content": "The capital of France is Paris. The Seine flows through it."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) + 0.05
    weights[:, 0] = 0
    return ids, weights


def probe_real(model, tokenizer, route):
    ids, weights = real_batch(tokenizer)
    with probe(model) as probed:
        if route == "logits":
            logits = model(input_ids=ids).logits
        else:
            logits = model.model(input_ids=ids).last_hidden_state @ model.lm_head.weight.T
        weighted(logits.float(), ids, weights).backward()
    model.zero_grad()
    assert max(r.log_p for r in probed.trained()) > math.log(0.9999)
    assert_recovered(probed, ids, weights)


@pytest.mark.model
@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_the_real_model(smol, route):
    probe_real(*smol, route)


@pytest.mark.model
@pytest.mark.full  # loads it once more
@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_the_real_model_in_bfloat16(route, smol_tokenizer):
    from ygivenx.models.model import load
    from ygivenx.models.resolve import sample_model_path

    path, gguf_file = sample_model_path()
    model, _ = load(path, gguf_file=gguf_file, dtype=torch.bfloat16)
    probe_real(model, smol_tokenizer, route)
