"""Longer than memory: chunk by chunk, the same numbers and gradients."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import llama
from trees import assert_same, gradients, tree

import ygivenx as yx
from ygivenx.errors import ConfigError, ModelError
from ygivenx.models import streaming
from ygivenx.models.model import hidden_states, stream_hidden

ROWS = tree(0, count=14)


def named() -> yx.Forest:
    """A forest in which each node has its own number as its token, so that a forward pass tells what it is fed."""
    forest = yx.Forest.of(ROWS)
    return replace(forest, token=np.arange(len(forest.token)))


def watched(monkeypatch, forest: yx.Forest) -> list[list[int]]:
    """The fed nodes of each forward pass through a decoder."""
    fed, feed = [], streaming.feed

    def told(decoder, plan, token, needed):
        fed.append(np.searchsorted(forest.fed, token).tolist())
        return feed(decoder, plan, token, needed)

    monkeypatch.setattr(streaming, "feed", told)
    return fed


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_gradients_are_exact_whatever_the_chunk(chunk):
    model = llama()
    whole, parts = yx.loss(model, ROWS), yx.loss(model, ROWS, chunk=chunk)
    assert parts.value.item() == pytest.approx(whole.value.item(), rel=1e-6)
    assert_same(gradients(model, parts.value), gradients(model, whole.value), 1e-5)


@pytest.mark.parametrize("chunk", [None, 16])
def test_gradient_checkpointing_changes_nothing(chunk):
    model = llama()
    wanted = gradients(model, yx.loss(model, ROWS).value)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, yx.loss(model, ROWS, chunk=chunk).value), wanted, 1e-5)


def test_reentrant_checkpointing_is_refused():
    model = llama().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="reentrant"):
        hidden_states(model, yx.Forest.of(ROWS), chunk=16)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_is_nothing_to_scores():
    model, forest = llama(), yx.Forest.of(ROWS)
    wanted = torch.cat([h for _, h in stream_hidden(model, forest, chunk=16)])
    model.activation_checkpointing_enable({"use_reentrant": True})
    hidden_states(model, forest, chunk=16)  # in eval mode nothing is checkpointed
    with torch.no_grad():
        parts = list(stream_hidden(model.train(), forest, chunk=16))
    torch.testing.assert_close(torch.cat([h for _, h in parts]), wanted)


def test_rows_come_in_order_and_equal_the_whole():
    model, forest = llama(), yx.Forest.of(ROWS)
    parts = list(stream_hidden(model, forest, chunk=10))
    assert np.concatenate([rows for rows, _ in parts]).tolist() == list(range(len(forest.fed)))
    assert max(len(rows) for rows, _ in parts) <= 10
    streamed = torch.cat([h for _, h in parts])
    assert not streamed.requires_grad
    torch.testing.assert_close(streamed, hidden_states(model, forest).detach(), rtol=1e-5, atol=2e-5)


def test_only_the_path_is_kept(monkeypatch):
    """The stack at each chunk is exactly the ancestors of what follows, never what has been left."""
    model, forest = llama(), yx.Forest.of(ROWS)
    sizes, starts = [], []
    call = streaming.Run.__call__

    def watched(run, chunk, past):
        starts.append(chunk.start)
        sizes.append({k.shape[2] for k, _ in past.values()})
        return call(run, chunk, past)

    monkeypatch.setattr(streaming.Run, "__call__", watched)
    list(stream_hidden(model, forest, chunk=10))
    end = forest.fed_end
    paths = [int((end[:start] > start).sum()) for start in starts]
    assert sizes[1:] == [{n} for n in paths[1:]]
    assert max(paths) < len(end) / 2


@pytest.mark.parametrize("through", ["loss", "hidden states"])
def test_dropout_is_drawn_again_as_it_was(through):
    """The second pass must see the first one's draw: with p = 0.5 any other is far away."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(llama(), config).double().train()
    forest = yx.Forest.of(ROWS)
    direction = torch.randn(len(forest.fed), 32, dtype=torch.float64)

    def value() -> torch.Tensor:
        torch.manual_seed(7)
        if through == "loss":
            return yx.loss(model, forest, chunk=20).value
        return (hidden_states(model, forest, chunk=20) * direction).sum()

    made = gradients(model, value())
    name, p = next((n, p) for n, p in model.named_parameters() if "layers.0.self_attn.v_proj.lora_B" in n)
    # The model's norms compute in float32 whatever its dtype: a smaller step would drown in their rounding.
    step = 1e-3 * torch.randn_like(p)
    p.data += step
    up = value()
    p.data -= 2 * step
    down = value()
    assert (up - down).item() / 2 == pytest.approx((made[name] * step).sum().item(), rel=1e-2)


def test_trying_the_trunk_draws_no_random_numbers():
    """Whoever seeds a run gets the same numbers as from its hidden states."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
    model, forest = get_peft_model(llama(), config).train(), yx.Forest.of(ROWS)
    needed = np.unique(forest.edges().rows)
    torch.manual_seed(7)
    yx.loss(model, forest, chunk=20)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    hidden_states(model, forest, chunk=20, needed=needed)
    assert torch.equal(after, torch.get_rng_state())


def test_float16_gradients_are_scaled_before_they_are_made():
    """A scaler's factor comes with backward: made before, gradients so small would have been rounded to zero."""
    model, scale = llama(), 2.0**12

    def made(dtype: torch.dtype | None, chunk: int | None) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype or torch.float16, enabled=dtype is not None):
            value = yx.loss(model, ROWS, chunk=chunk, denominator=scale * 100).value
        return gradients(model, value * scale)

    for chunk in (20, None):
        assert_same(made(torch.float16, chunk), made(None, None), 0.05)


def test_autocast_is_the_same_in_the_second_pass():
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        whole, parts = (yx.loss(model, ROWS, chunk=c).value for c in (None, 20))
    assert_same(gradients(model, parts), gradients(model, whole), 0.05)


def test_backward_twice_gives_it_twice():
    model = llama()
    value = yx.loss(model, ROWS, chunk=20).value
    value.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    value.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("through", ["loss", "hidden states"])
def test_hooks_on_parameters_see_whole_gradients_once(through):
    direction = torch.randn(len(yx.Forest.of(ROWS).fed), 32)

    def made(chunk):
        model, forest, seen = llama(), yx.Forest.of(ROWS), []
        for p in model.parameters():
            p.register_hook(lambda grad: grad.clamp(-0.01, 0.01) * 2)
            p.register_post_accumulate_grad_hook(seen.append)
        value = yx.loss(model, forest, chunk=chunk).value
        if through != "loss":
            value = (hidden_states(model, forest, chunk=chunk) * direction).mean()
        value.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(seen) == len(found)
        return found

    assert_same(made(20), made(None), 1e-4)


@pytest.mark.parametrize("through", ["loss", "hidden states"])
def test_second_derivatives_are_refused(through):
    model, forest = llama(), yx.Forest.of(ROWS)
    value = yx.loss(model, forest, chunk=20).value
    if through != "loss":
        value = hidden_states(model, forest, chunk=20).sum()
    with pytest.raises(ModelError, match="no second derivatives"):
        torch.autograd.grad(value, model.model.norm.weight, create_graph=True)


def test_it_is_chosen_where_memory_would_not_do(monkeypatch):
    model, forest = llama(vocab_size=512), named()
    fed = watched(monkeypatch, forest)
    hidden_states(model, forest)
    yx.loss(model, forest)
    assert list(map(len, fed)) == [len(forest.fed)] * 2
    monkeypatch.setattr(streaming, "automatic", lambda model: 50)
    for run in (hidden_states, yx.loss):
        fed.clear()
        run(model, forest)
        assert 0 < max(map(len, fed)) <= 50


def test_what_is_computed_once_is_as_long_as_a_chunk_may_be(monkeypatch):
    """Of two chunks of 60 % each, the smaller part comes twice: first without gradients, and last with them."""
    model, forest = llama(vocab_size=512), named()
    length = len(forest.fed)
    chunk, fed = length * 3 // 5, watched(monkeypatch, forest)
    hidden_states(model, forest, chunk=chunk).sum().backward()
    early, late, again = fed
    assert again == early
    assert len(late) == chunk
    assert sorted(early + late) == list(range(length))


def test_a_loss_computes_twice_only_what_later_chunks_see(monkeypatch):
    model, forest = llama(vocab_size=512), named()
    fed = watched(monkeypatch, forest)
    yx.loss(model, forest, chunk=20).value.backward()
    chunk_of = {
        node: chunk for chunk, nodes in enumerate(fed) for node in nodes
    }  # the last time, with gradients
    below = [range(node + 1, end) for node, end in enumerate(forest.fed_end)]
    seen = [any(chunk_of[d] != chunk_of[node] for d in below[node]) for node in range(len(below))]
    times = Counter(node for nodes in fed for node in nodes)
    assert 0 < sum(seen) < len(seen) * 0.6
    assert [times[node] for node in range(len(seen))] == [1 + s for s in seen]


def conversation() -> yx.Forest:
    """Twelve turns whose reasoning the next prompt drops: shared is a chain, with a leaf at each turn."""
    history, rows = list(range(10)), []
    for turn in range(12):
        rows.append(([*history, *range(100 * turn, 100 * turn + 30)], [0] * len(history) + [1] * 30))
        history += range(5000 + 10 * turn, 5010 + 10 * turn)
    return yx.Forest.of(rows)


def test_the_order_for_gradients_is_a_preorder_in_which_everyone_sees_the_same():
    run = streaming.Run.of(llama(), yx.Forest.of(ROWS), 20, "auto", needed=np.array([0, 5, 9]))
    other = run.for_gradients()
    at = np.arange(len(run.end))
    sees = (at[:, None] >= at) & (at[:, None] < run.end)
    sees_there = (at[:, None] >= at) & (at[:, None] < other.end)
    assert (other.order != at).any()
    assert (sees_there == sees[np.ix_(other.order, other.order)]).all()
    assert (other.depth == run.depth[other.order]).all()
    assert sorted(other.order[other.needed]) == [0, 5, 9]


def test_in_the_order_for_gradients_a_conversation_has_less_to_compute_twice():
    run = streaming.Run.of(llama(), conversation(), 300, "auto")
    trunk, before = run.for_gradients().trunk, replace(run, longest_last=True).trunk
    assert len(trunk) < 0.6 * len(before)


def test_the_estimate_knows_what_is_kept():
    model = llama(num_hidden_layers=12)
    kept = streaming.automatic(model)
    with torch.no_grad():
        assert streaming.automatic(model) > 5 * kept
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert streaming.automatic(model) > 3 * kept


def test_windows_in_chunks():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    whole, parts = (yx.loss(model, ROWS, chunk=c).value for c in (None, 8))
    assert_same(gradients(model, parts), gradients(model, whole), 1e-5)


def test_no_chunk_of_nothing():
    with pytest.raises(ConfigError, match="chunk is 0"):
        list(stream_hidden(llama(), yx.Forest.of(ROWS), chunk=0))


@pytest.mark.full
def test_a_trajectory_of_16k_tokens_trains():
    """One sequence of 16,384 tokens, in 16 chunks."""
    rng = np.random.default_rng(0)
    row = (rng.integers(0, 97, 16_384), np.r_[0, np.ones(16_383)])
    model = llama(num_hidden_layers=2, max_position_embeddings=16_384)
    yx.loss(model, [row], chunk=1024).value.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
