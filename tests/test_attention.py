"""Routes: all the numbers of the dense twin, forward and backward; and the traps of masks."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import llama
from torch.nn.attention.flex_attention import create_block_mask
from transformers import Qwen2Config, Qwen2ForCausalLM
from trees import assert_same, gradients, tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import ConfigError, ModelError
from ygivenx.models import attention, blockwise_attention, flex, sharing
from ygivenx.models import plan as routes
from ygivenx.models.model import hidden_states
from ygivenx.models.plan import Plan, automatic


def options(scale=0.25, window=None, softcap=None, sinks=None, dropout=0.0):
    return attention._Options(scale, window, softcap, sinks, dropout)


def inputs(
    length: int, dtype=torch.float64, heads: int = 4, kv: int = 2, width: int = 16, seen: int | None = None
):
    torch.manual_seed(0)
    shapes = [(1, heads, length, width), *[(1, kv, seen or length, width)] * 2]
    return [
        torch.randn(s, dtype=dtype).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for s in shapes
    ]


def plan_of(forest: yx.Forest, route: str) -> Plan:
    return Plan.of(forest.fed_end, forest.depth[forest.fed], torch.device("cpu"), route)


@pytest.mark.parametrize("block", [1, 3, 16, 256])
@pytest.mark.parametrize("long", [1, 4, 1000])
@pytest.mark.parametrize("window", [None, 1, 5, 30])
def test_blocks_equal_the_twin(block, long, window, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "QUERIES_PER_BLOCK", block)
    monkeypatch.setattr(blockwise_attention, "LONG", long)
    for seed in range(3):
        forest = yx.Forest.of(tree(seed))
        tensors = inputs(len(forest.fed))
        g = torch.randn_like(tensors[0])
        made = {}
        for route in ("dense", "blocks"):
            out = attention._routed(plan_of(forest, route), *tensors, options(window=window))
            made[route] = [out, *torch.autograd.grad(out, tensors, g)]
        for a, b in zip(made["blocks"], made["dense"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("heads", "kv"), [(4, 1), (6, 2), (9, 3), (4, 4)])
@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize("many", [0, 1000])
def test_however_heads_are_dealt_to_threads_gradients_are_the_same(heads, kv, threads, many, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "QUERIES_PER_BLOCK", 8)
    monkeypatch.setattr(blockwise_attention, "MANY", many)
    monkeypatch.setattr(blockwise_attention.torch, "get_num_threads", lambda: threads)
    forest = yx.Forest.of(tree(1))
    tensors = inputs(len(forest.fed), heads=heads, kv=kv)
    tiles = blockwise_attention.make_tiles(plan_of(forest, "blocks"), None)
    batches = {blockwise_attention._Fold.of(t, *tensors[:2]).even(t).batch for part in tiles for t in part}
    assert batches == {1} if threads == 1 or heads == kv else max(batches) > 1 or kv == threads
    g = torch.randn_like(tensors[0])
    made = {}
    for route in ("dense", "blocks"):
        out = attention._routed(plan_of(forest, route), *tensors, options())
        made[route] = torch.autograd.grad(out, tensors, g)
    for a, b in zip(made["blocks"], made["dense"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_blocks_that_one_path_leads_to_see_it_together():
    """A turn's answer and what comes after its question part from one path, with whole subtrees between them."""
    trunk, ids = np.arange(300), np.arange(1000, 1200)
    rows = [np.concatenate((trunk, ids, ids[:150] + 1000 * k)) for k in (1, 2)] + [
        np.concatenate((trunk, ids + 9000))
    ]
    forest = yx.Forest.of((r, np.zeros(len(r))) for r in rows)
    tiles = blockwise_attention.make_tiles(plan_of(forest, "blocks"), None)
    seen = {sum(k.stop - k.start for k in tile.keys): len(tile.rows) for tile in tiles.far}
    assert seen == {300: 2, 500: 1}  # by length of the path: how many runs of queries see it


def test_what_paths_begin_with_alike_is_seen_at_once():
    """Of five turns whose answers are no history: one product where each block would have had its own."""
    history, rows = np.arange(600), []
    for turn in range(1, 6):
        rows.append(np.concatenate((history, np.arange(200) + 10_000 * turn)))
        history = np.concatenate((history, np.arange(140) + 20_000 * turn))
    forest = yx.Forest.of((r, np.zeros(len(r))) for r in rows)
    far = blockwise_attention.make_tiles(plan_of(forest, "blocks"), None).far
    first = max(far, key=lambda tile: tile.count)
    assert [(run.start, run.stop) for run in first.keys] == [(0, 600)]
    assert first.count == len(forest.fed) - 600  # all that stands further back than the beginning
    rest = [tile for tile in far if tile is not first]
    assert all(run.start >= 600 for tile in rest for run in tile.keys)


def test_the_twin_is_softmax_over_ancestors():
    forest = yx.Forest.of(tree(5))
    q, k, v = (t.detach() for t in inputs(len(forest.fed), kv=4))
    out = attention.dense(q, k, v, attention.dense_mask(plan_of(forest, "dense"), None), options())
    place = {int(n): i for i, n in enumerate(forest.fed)}
    for i, node in enumerate(forest.fed):
        path, u = [], int(node)
        while u >= 0:
            path.append(place[u])
            u = int(forest.parent[u])
        weights = torch.softmax(q[0, :, i : i + 1] @ k[0][:, path].mT * 0.25, -1)
        torch.testing.assert_close(out[0, :, i : i + 1], weights @ v[0][:, path])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("long", [8, 512])
def test_blocks_in_other_precisions(dtype, long, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "QUERIES_PER_BLOCK", 16)  # else so small a forest is one block
    monkeypatch.setattr(blockwise_attention, "LONG", long)
    forest = yx.Forest.of(tree(1))
    assert blockwise_attention.make_tiles(plan_of(forest, "blocks"), None).far
    exact = inputs(len(forest.fed))
    tensors = [t.detach().to(dtype).requires_grad_() for t in exact]
    out = attention._routed(plan_of(forest, "blocks"), *tensors, options())
    twin = attention._routed(plan_of(forest, "dense"), *(t.double() for t in tensors), options())
    assert out.dtype == dtype
    # Two parts are merged from their rounded values: a few units of the last place.
    assert (out.double() - twin).norm() <= 8 * torch.finfo(dtype).eps * twin.norm()
    for a, b in zip(
        *(torch.autograd.grad(o.double().square().sum(), tensors) for o in (out, twin)), strict=True
    ):
        assert (a.double() - b.double()).norm() <= 32 * torch.finfo(dtype).eps * b.double().norm()


def apart(lengths=(7, 1, 30, 12)) -> yx.Forest:
    """Sequences that share nothing; a chain of n tokens feeds n - 1."""
    return yx.Forest.of((np.arange(n + 1) + 100 * i, np.zeros(n + 1)) for i, n in enumerate(lengths))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_varlen_equals_the_twin(dtype):
    forest = apart()
    tensors = inputs(len(forest.fed), dtype)
    g = torch.randn_like(tensors[0])
    made = {}
    for route in ("dense", "varlen"):
        out = attention._routed(plan_of(forest, route), *tensors, options())
        assert out.dtype == dtype
        made[route] = [out, *torch.autograd.grad(out, tensors, g)]
    for a, b in zip(made["varlen"], made["dense"], strict=True):
        assert (a - b).double().norm() <= 8 * torch.finfo(dtype).eps * b.double().norm()


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors"
)  # of strided ones, which that kernel makes
def test_what_surrounds_the_kernel_of_jagged_tensors_keeps_heads_and_tokens_in_place():
    """Without a GPU torch has no causal kernel for them; the others take the same way in and out, with gradients."""
    forest = apart()
    plan, tensors = plan_of(forest, "varlen"), inputs(len(forest.fed), torch.float32)
    out = attention.varlen(*tensors, attention.varlen_cuts(plan, None), 0.25, causal=False)
    parts = zip(*(t.split(np.diff(plan.bounds).tolist(), 2) for t in tensors), strict=True)
    everything = torch.ones(1, 1, dtype=torch.bool)
    twin = torch.cat([attention.dense(*part, everything, options()) for part in parts], 2)
    g = torch.randn_like(twin)
    for a, b in zip(
        (out, *torch.autograd.grad(out, tensors, g)),
        (twin, *torch.autograd.grad(twin, tensors, g)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [{"window": 4}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}])
@pytest.mark.parametrize("forest", [apart(), apart((30,))], ids=["varlen", "plain"])
@torch.no_grad()
def test_sequences_whose_layers_have_no_kernel_take_the_route_of_forests(forest, case):
    tensors = [t.detach() for t in inputs(len(forest.fed))]
    route = "plain" if len(forest.paths) == 1 else "varlen"
    ours, twin = (attention._routed(plan_of(forest, r), *tensors, options(**case)) for r in (route, "dense"))
    torch.testing.assert_close(ours, twin)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [{}, {"window": 4}, {"softcap": 2.0}, {"window": 7, "softcap": 5.0}])
@torch.no_grad()
def test_flex_equals_the_twin(case):
    for seed in range(2):
        forest = yx.Forest.of(tree(seed))
        tensors = [t.detach() for t in inputs(len(forest.fed), torch.float32)]
        flex, dense = (
            attention._routed(plan_of(forest, r), *tensors, options(**case)) for r in ("flex", "dense")
        )
        torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_mask_function_of_flex_is_the_mask():
    forest = yx.Forest.of(tree(2))
    for window in (None, 6):
        plan = plan_of(forest, "flex")
        i = torch.arange(len(forest.fed))
        zero = torch.zeros((), dtype=torch.int64)
        allowed = flex.flex_mask(plan, window).mask_mod(zero, zero, i[:, None], i[None, :])
        assert torch.equal(allowed, attention.dense_mask(plan, window))


@pytest.mark.parametrize("window", [None, 3, 6, 20, 500])
@pytest.mark.parametrize("first", [0, 1, 8, 46])
def test_blocks_of_flex_are_those_that_the_mask_has_something_in(window, first, monkeypatch):
    """None is left out, and of those that are skipped or taken as a whole there are as many as there may be."""
    monkeypatch.setattr(flex, "TOKENS_PER_BLOCK", 8)
    seen = {"some": 0, "every": 0, "needless": 0}
    for seed in range(6):
        forest = yx.Forest.of(tree(seed))
        plan = Plan(forest.fed_end, forest.depth[forest.fed], "flex", torch.device("cpu"), first)
        mask = attention.dense_mask(plan, window).numpy()
        some, every = flex.pairs_of_blocks(plan.end, plan.depth, first, window)
        for i, j in np.ndindex(*some.shape):
            part = mask[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            assert some[i, j] or not part.any()
            assert part.all() if every[i, j] else True
            assert every[i, j] <= some[i, j]
            seen["needless"] += int(some[i, j] and not part.any())
            seen["every"] += int(every[i, j])
            seen["some"] += int(some[i, j])
        if first == 0 and window is None:
            made = create_block_mask(flex.flex_mask(plan, None).mask_mod, None, None, *mask.shape, "cpu", 8)
            ours = flex.flex_mask(plan, None)
            assert torch.equal(made.to_dense(), ours.to_dense())
            assert torch.equal(made.full_kv_num_blocks, ours.full_kv_num_blocks)
            assert torch.equal(made.full_q_num_blocks, ours.full_q_num_blocks)
    assert seen["every"] or window in (3, 6)
    assert seen["needless"] <= seen["some"] / 3


@torch.no_grad()
def test_what_flex_compiles_holds_tensors_alone(monkeypatch):
    """The compiler makes symbols of numbers, and fails with a soft-cap that is one."""
    given = {}
    monkeypatch.setattr(
        flex, "flex_attention", lambda query, *_, **options: (given.update(options), query)[1]
    )
    end, depth = (a(yx.Forest.of(tree(2))) for a in (lambda f: f.fed_end, lambda f: f.depth[f.fed]))
    plan = Plan(end, depth, "flex", torch.device("cpu"), 20)
    attention._routed(plan, *inputs(len(end) - 20, seen=len(end)), options(window=6, softcap=5.0))
    for function in (given["score_mod"], given["block_mask"].mask_mod):
        held = [cell.cell_contents for cell in function.__closure__]
        assert held
        assert all(isinstance(value, torch.Tensor) for value in held)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch's compiler
@torch.no_grad()
def test_flex_is_compiled_once_for_forests_of_all_lengths():
    """Traced, without making kernels of it: what is traced again would be compiled again."""
    from torch._dynamo.utils import counters

    run = torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend="eager")
    for case in ({}, {"window": 40}, {"window": 150, "softcap": 5.0}):
        before = counters["stats"]["unique_graphs"]
        for seed, part in ((1, 0.0), (2, 0.5), (3, 0.0), (4, 0.9)):
            forest = yx.Forest.of(tree(seed, low=20, high=100 + 60 * seed))
            end, depth = forest.fed_end, forest.depth[forest.fed]
            plan = Plan(end, depth, "flex", torch.device("cpu"), int(part * len(end)))
            tensors = [t.detach() for t in inputs(len(end) - plan.first, torch.float32, seen=len(end))]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(flex, "flex_attention", run)
                ours = attention._routed(plan, *tensors, options(**case))
            twin = attention._routed(replace(plan, route="dense", built={}), *tensors, options(**case))
            torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] - before <= 2


def test_sinks_take_their_share():
    """A sink is one more key with a learned score and no value (gpt-oss)."""
    forest = yx.Forest.of(tree(0))
    q, k, v = inputs(len(forest.fed), kv=4)
    sinks = torch.randn(4, dtype=torch.float64)
    mask = attention.dense_mask(plan_of(forest, "dense"), None)
    plain = attention.dense(q, k, v, mask, options())
    lse = (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf).logsumexp(-1)
    with_sinks = attention._routed(plan_of(forest, "blocks"), q, k, v, options(sinks=sinks))
    torch.testing.assert_close(
        with_sinks.double(), plain * torch.sigmoid(lse - sinks[:, None])[..., None], rtol=1e-5, atol=1e-6
    )


def test_one_sequence_goes_plain_and_a_forest_may_not():
    chain, forest = yx.Forest.of([tree(0)[0]]), yx.Forest.of(tree(0))
    assert plan_of(chain, "auto").route == "plain"
    assert plan_of(forest, "auto").route == "blocks"
    assert plan_of(apart(), "auto").route == "blocks"
    for route in ("plain", "varlen"):
        with pytest.raises(ConfigError, match="this forest branches"):
            plan_of(forest, route)
    with pytest.raises(ConfigError, match="one sequence"):
        plan_of(apart(), "plain")
    with pytest.raises(ConfigError, match="did you mean 'blocks'"):
        plan_of(forest, "block")


def test_position_bias_is_refused():
    q = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ModelError, match="position_bias"):
        attention._Options.of(None, q, {"position_bias": q})


def test_a_scale_of_zero_is_a_scale():
    assert attention._Options.of(None, torch.zeros(1, 1, 1, 4), {"scaling": 0.0}).scale == 0


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_the_model_runs_as_before_without_a_forest(stock):
    """Trap: once we are in the registry, the model's own calls, padded ones too, must not change by one bit."""
    model = llama()
    model.set_attn_implementation(stock)
    ids = torch.arange(24).reshape(2, 12)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    with torch.no_grad():
        before = [
            model(ids).logits,
            model(ids, attention_mask=padding).logits,
            model.generate(ids, max_new_tokens=3),
        ]
        hidden_states(model, yx.Forest.of(tree(0)))
        after = [
            model(ids).logits,
            model(ids, attention_mask=padding).logits,
            model.generate(ids, max_new_tokens=3),
        ]
    assert all(map(torch.equal, before, after))
    assert stock in model.config._attn_implementation


def test_nothing_of_it_is_saved_with_the_model(tmp_path):
    model = llama()
    with torch.no_grad():
        hidden_states(model, yx.Forest.of(tree(0)))
    model.save_pretrained(tmp_path)
    assert "ygivenx" not in (tmp_path / "config.json").read_text()
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(*(hidden_states(m, yx.Forest.of(tree(0))) for m in (model, again)))


def test_eager_models_are_not_misled_by_a_boolean_mask():
    """Trap: transformers adds a boolean 4-D mask to eager scores as 0 and 1, and is silently wrong."""
    rows = tree(4)
    model = llama()
    model.set_attn_implementation("eager")
    assert_same(gradients(model, yx.loss(model, rows).value), gradients(model, reference.loss(model, rows)))


def test_sliding_windows_survive_the_mask():
    """Trap: one 4-D mask for all layers drops sliding windows."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1, initializer_range=0.3,
    )  # fmt: skip
    assert config.layer_types == ["full_attention", "sliding_attention"]
    model, rows = Qwen2ForCausalLM(config).eval(), tree(6)
    with torch.no_grad():
        assert yx.loss(model, rows).value.item() == pytest.approx(
            reference.loss(model, rows).item(), rel=1e-6
        )
        full = copy.deepcopy(config)
        full.layer_types = ["full_attention"] * 2
        without = Qwen2ForCausalLM(full).eval()
        without.load_state_dict(model.state_dict())
        assert yx.loss(without, rows).value.item() != pytest.approx(
            yx.loss(model, rows).value.item(), rel=1e-4
        )


def test_positions_of_a_tree_are_not_taken_for_packed_sequences():
    """Trap: where depths fall back, transformers assumes that a new packed sequence begins."""
    trunk = np.arange(1, 9)
    rows = [
        (np.concatenate((trunk, [20 + i, 30 + i, 40 + i])), np.ones(11) * (np.arange(11) > 0))
        for i in range(3)
    ]
    model = llama()
    with torch.no_grad():
        value = yx.loss(model, rows).value.item()
        expected = reference.loss(model, [yx.Sequence(*r) for r in rows]).item()
    assert value == pytest.approx(expected, rel=1e-6)


def test_dropout_of_attention_is_drawn_per_node():
    model = llama(attention_dropout=0.5).train()
    rows = tree(1)
    torch.manual_seed(0)
    first = yx.loss(model, rows).value
    torch.manual_seed(0)
    assert torch.equal(first, yx.loss(model, rows).value)
    assert first.item() != pytest.approx(yx.loss(model, rows).value.item(), rel=1e-6)


@pytest.mark.parametrize("compiles", [True, False])
def test_explain_says_the_route(compiles, monkeypatch):
    monkeypatch.setattr(routes, "find_spec", lambda name: compiles or None)
    assert sharing.explain()["one sequence"] == "plain"
    told = sharing.explain(llama())
    assert told["forest"] == told["sequences that share nothing"] == "blocks"
    assert automatic(torch.device("cuda")) == ("flex" if compiles else "dense")
    assert automatic(torch.device("cuda"), shared=False) == "varlen"
