"""On a CUDA device: the same numbers as everywhere else, by the routes that only such a device takes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_attention import apart, inputs, options
from test_families import CASES, build
from test_head import check_float32, random_case
from test_routes import in_packs, one, run, unshared, varlen
from test_scoring import one_by_one
from test_trainer import make
from tiny import VOCAB, llama, score_sequences, sequences
from trees import assert_same, gradients, tree

import ygivenx as yx
from ygivenx import reference
from ygivenx.head.selective import selective_cross_entropy
from ygivenx.models import attention, memory
from ygivenx.models.plan import Plan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # What torch falls back to, quietly, when it stops compiling: all weights of attention in memory.
    pytest.mark.filterwarnings("error:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
CUDA = torch.device("cuda")


def close(ours, theirs, dtype, room: float = 16) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == dtype
        assert (a - b).double().norm() <= room * torch.finfo(dtype).eps * b.double().norm()


def by_routes(plans, tensors, **case):
    """Of each plan the output and the gradients."""
    made, g = [], torch.randn_like(tensors[0])
    for plan in plans:
        out = attention._routed(plan, *tensors, options(**case))
        made.append([out, *torch.autograd.grad(out, tensors, g)])
    return made


@pytest.mark.parametrize(
    ("dtype", "heads", "width", "case"),
    [
        (torch.float32, 9, 64, {}),
        (torch.float32, 4, 16, {"window": 40, "softcap": 5.0}),
        (torch.bfloat16, 9, 64, {}),
        (torch.bfloat16, 8, 128, {"window": 150}),
        (torch.bfloat16, 4, 96, {"softcap": 2.0}),
        (torch.float16, 6, 80, {}),
    ],
)
def test_flex_equals_the_twin(dtype, heads, width, case):
    """Short and long forests, whole and as the chunk of a longer one."""
    kv = 3 if heads == 9 else 2
    for high, part in ((12, 0.0), (300, 0.0), (300, 0.4), (600, 0.9)):
        forest = yx.Forest.of(tree(1, low=3, high=high))
        end, depth = forest.fed_end, forest.depth[forest.fed]
        first = int(part * len(end))
        tensors = inputs(len(end) - first, dtype, heads, kv, width, seen=len(end))
        tensors = [t.detach().cuda().requires_grad_() for t in tensors]
        plans = [Plan(end, depth, route, CUDA, first) for route in ("flex", "dense")]
        close(*by_routes(plans, tensors, **case), dtype, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_equals_the_twin(dtype):
    forest = apart()
    tensors = [t.detach().cuda().requires_grad_() for t in inputs(len(forest.fed), dtype)]
    plans = [Plan.of(forest.fed_end, forest.depth[forest.fed], CUDA, route) for route in ("varlen", "dense")]
    close(*by_routes(plans, tensors), dtype)


def test_forests_of_any_length_are_compiled_once_or_twice():
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    for seed in range(12):
        forest = yx.Forest.of(tree(seed, low=30, high=60 + 40 * seed))
        tensors = [
            t.detach().cuda().requires_grad_() for t in inputs(len(forest.fed), torch.float32, width=32)
        ]
        plan = Plan.of(forest.fed_end, forest.depth[forest.fed], CUDA, "flex")
        attention._routed(plan, *tensors, options()).sum().backward()
    assert counters["stats"]["unique_graphs"] - before <= 3


@pytest.mark.parametrize("options", [{}, {"route": "dense"}, {"chunk": 37}, {"chunk": 200}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_families(case, options):
    model, rows = build(case, wide=True).cuda(), tree(2, high=120)
    model.config._attn_implementation = "eager"  # transformers' one that always keeps soft-caps and sinks
    expected = reference.loss(model, rows)
    wanted = gradients(model, expected)
    out = yx.loss(model, rows, **options)
    assert out.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, out.value), wanted, 1e-4)  # Granite alone is off by 4e-5 from float64


def wide():
    return llama(hidden_size=64)


@pytest.mark.parametrize(
    "step", [one(), one(chunk=150), in_packs, unshared, varlen],
    ids=["forest", "in chunks", "in packs", "unshared", "varlen"],
)  # fmt: skip
def test_twenty_losses_are_those_of_a_cpu(step, monkeypatch):
    monkeypatch.setattr("test_routes.STEPS", [tree(seed, count=6, high=120) for seed in range(20)])
    monkeypatch.setattr("test_routes.llama", wide)
    expected = run(one(route="dense"))
    monkeypatch.setattr("test_routes.llama", lambda: wide().cuda())
    assert run(step) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_as_near_to_float64_as_the_sequences_alone():
    exact, rows = wide().cuda().double(), tree(3, high=150)
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())  # the same rounded weights
    wanted = gradients(exact, reference.loss(exact, rows))

    def off(value) -> float:
        ours = gradients(model, value)
        return max(float((ours[n].double() - g).norm() / g.norm()) for n, g in wanted.items())

    assert off(yx.loss(model, rows).value) <= 1.5 * off(reference.loss(model, rows)) + 1e-3


@torch.no_grad()
def test_scores_are_those_of_a_cpu():
    data = sequences(9, seed=6)
    for window in (24, 10_000):
        told = score_sequences(llama().cuda(), data, window=window, tokens=True)
        for s, t in zip(data, told, strict=True):
            np.testing.assert_allclose(t.token_log_p, one_by_one(llama(), s), atol=3e-5)


def test_random_cases_of_the_head_agree_with_the_twin():
    for seed in range(60):
        case = random_case(seed)
        for name in ("hidden", "weight", "bias", "rows", "targets", "weights"):
            t = getattr(case, name)
            setattr(case, name, t if t is None else t.detach().cuda().requires_grad_(t.requires_grad))
        case.wanted = [t for t in (case.hidden, case.weight, case.bias) if t is not None and t.requires_grad]
        check_float32(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_head_equals_its_twin_and_holds_no_logits(dtype, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(2000, 128, device=CUDA, dtype=dtype).requires_grad_()
    weight = (torch.randn(64_000, 128, device=CUDA) / 8).to(dtype).requires_grad_()
    rows, targets = (torch.randint(0, n, (2500,), device=CUDA) for n in (2000, 64_000))
    weights = torch.rand(2500, device=CUDA)
    made = []
    for f, more in (
        (selective_cross_entropy, {"memory": 128 << 20}),
        (reference.selective_cross_entropy, {}),
    ):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        log_p, loss = f(hidden, weight, rows, targets, weights, softcap=softcap, **more)
        grads = torch.autograd.grad(loss, (hidden, weight))
        made.append([log_p.detach(), loss.detach(), *grads])
        if more:  # all logits: 512 MB in float32
            assert torch.cuda.max_memory_allocated() - before < 256 << 20
    for a, b in zip(*made, strict=True):
        room = 2e-5 if torch.float32 in (dtype, a.dtype) else 1e-2
        assert float((a.double() - b.double()).norm() / b.double().norm()) <= room


def losses(path, data, **options) -> list[float]:
    trainer = make(path, data, max_steps=6, logging_steps=1, max_tokens=80, save_strategy="no", **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_of_the_trainer(tmp_path):
    data = tree(4, count=12)
    cpu = losses(tmp_path / "cpu", data)
    assert losses(tmp_path / "gpu", data, use_cpu=False) == pytest.approx(cpu, rel=1e-4)
    assert losses(tmp_path / "bf16", data, use_cpu=False, bf16=True) == pytest.approx(cpu, rel=3e-2)
    assert losses(tmp_path / "fp16", data, use_cpu=False, fp16=True) == pytest.approx(cpu, rel=3e-2)


def test_a_run_that_is_resumed_goes_on_with_the_same_losses(tmp_path):
    data = sequences(12, seed=5)
    settings = {"use_cpu": False, "max_steps": 6, "save_steps": 3, "logging_steps": 1}
    whole, resumed = (make(tmp_path, data, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_peak_memory_is_that_of_the_device():
    kept = torch.empty(64 << 20, dtype=torch.uint8, device=CUDA)
    assert memory.peak() >= len(kept)
    assert memory.total(CUDA) > 1 << 30


def test_long_sequences_are_streamed_in_less_memory():
    model = llama(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        max_position_embeddings=20_000,
        initializer_range=0.05,
    ).cuda()
    rows = tree(5, count=6, low=2000, high=4000)
    peaks, made = [], []
    for chunk in (1 << 30, 1024):
        torch.cuda.reset_peak_memory_stats()
        made.append(gradients(model, yx.loss(model, rows, chunk=chunk).value))
        peaks.append(torch.cuda.max_memory_allocated())
    assert_same(made[1], made[0])
    assert peaks[1] < 0.7 * peaks[0]
