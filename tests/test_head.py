"""The selective head against its float64 twin."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ygivenx import reference
from ygivenx.errors import ModelError
from ygivenx.head import edges, full_vocab, fused, kernel, pages, passes, tiled
from ygivenx.head.logit_head import LogitHead
from ygivenx.head.selective import explain, head_values, log_probs, selective_cross_entropy
from ygivenx.head.tiles import Marks

CASES = int(os.environ.get("YGIVENX_CASES", "300"))


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    options: dict[str, Any]
    bias: Tensor | None = None
    z_loss: float = 0.0
    memory: int = tiled.MEMORY_BYTES
    wanted: list[Tensor] = field(default_factory=list)

    @property
    def size(self) -> float:
        """The largest logit: float32 products lose digits in proportion, and where their terms cancel to the terms."""
        with torch.no_grad():
            z = reference.all_logits(self.hidden, self.weight, bias=self.bias, scale=self.options["scale"])
            terms = float(self.hidden.norm(dim=1).max() * self.weight.norm(dim=1).max())
        return 1 + max(float(z.abs().max()), terms / 32)

    def ours(self) -> tuple[Tensor, Tensor]:
        edges = (self.rows, self.targets, self.weights)
        more = {"bias": self.bias, "z_loss": self.z_loss, "memory": self.memory}
        return selective_cross_entropy(self.hidden, self.weight, *edges, **self.options, **more)

    def twin(self) -> tuple[Tensor, Tensor]:
        edges = (self.rows, self.targets, self.weights)
        more = {"bias": self.bias, "z_loss": self.z_loss}
        return reference.selective_cross_entropy(self.hidden, self.weight, *edges, **self.options, **more)

    def grads(self, loss: Tensor, **kw: Any) -> list[Tensor]:
        return [g.double() for g in torch.autograd.grad(loss, self.wanted, **kw)]


def random_case(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows, size = int(rng.choice([1, 2, 7, 40, 130])), int(rng.choice([2, 6, 16, 34, 130]))
    vocabulary = int(rng.choice([1, 2, 11, 300, 1500]))
    edges = int(rng.choice([0, 1, rows, 2 * rows]))
    spread = float(rng.choice([0.1, 1, 5, 30]))  # 30: targets hopelessly far below, and confident ones
    hidden = torch.randn(rows, size).to(dtype).requires_grad_(rng.random() < 0.9)
    weight = (torch.randn(vocabulary, size) * spread / size**0.5).to(dtype).requires_grad_(rng.random() < 0.9)
    bias = torch.randn(vocabulary).to(dtype).requires_grad_() if rng.random() < 0.3 else None
    weights = torch.from_numpy(rng.choice([1.0, 1.0, 0.25, 0.0, 3.0, -1.0], edges)).float()
    options = {"softcap": 7.0 if rng.random() < 0.2 else None, "scale": float(rng.choice([1.0, 1.0, 0.3]))}
    picks = (torch.randint(0, rows, (edges,)), torch.randint(0, vocabulary, (edges,)))
    case = Case(hidden, weight, *picks, weights, options, bias, float(rng.choice([0, 0, 0.01])))
    case.memory = int(rng.choice([1, 1 << 17, 64 << 20]))
    case.wanted = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return case


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, blocks and rounds in small cases."""
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiled, "BLOCK_COLUMNS", 32)
    monkeypatch.setattr(fused, "TOTAL_BYTES", 1)
    monkeypatch.setattr(tiled, "WAITING_COLUMNS", 16)
    monkeypatch.setattr(tiled, "THIN_COLUMNS", 24)
    monkeypatch.setattr(full_vocab, "LEAST_ROWS", 16)


@pytest.fixture(params=["compiled", "torch", "torch, bfloat16 in float32", "whole vocabulary"])
def route(request, monkeypatch):
    if request.param == "whole vocabulary":  # what GPUs take
        monkeypatch.setattr(passes, "launches_are_costly", lambda device: True)
        return request.param
    if request.param == "compiled":
        if kernel.why_not():
            pytest.skip(kernel.why_not())
        return request.param
    monkeypatch.setenv(kernel.SWITCH, "0")
    monkeypatch.setattr(edges, "has_products", lambda dtype: request.param == "torch")
    return request.param


def relative(got: Tensor, true: Tensor, floor: float = 0.0) -> float:
    return float((got.double() - true.double()).norm() / (true.double().norm() + floor + 1e-30))


def check_float32(case: Case) -> None:
    log_p, loss = case.ours()
    true_p, true_loss = case.twin()
    tolerance = 5e-7 * case.size
    assert log_p.dtype == torch.float32
    assert not log_p.requires_grad
    torch.testing.assert_close(log_p.double(), true_p.detach(), rtol=1e-6, atol=tolerance)
    total = float((case.weights.abs() * (1 + true_p.detach().abs())).sum())
    assert abs(float(loss.detach()) - float(true_loss.detach())) <= tolerance * (total + 1) * (
        1 + case.z_loss * case.size
    )
    for got, true in zip(case.grads(loss), case.grads(true_loss), strict=True) if case.wanted else ():
        # Where the weights of a row cancel or everything is certain, what is left is rounding of what cancelled.
        floor = 0.1 * float(case.weights.norm())
        assert relative(got, true, floor) <= 3 * tolerance + 1e-6, (got, true)


def run_cases(first: int, count: int) -> None:
    for seed in range(first, first + count):
        case = random_case(seed)
        try:
            check_float32(case)
        except AssertionError as error:
            raise AssertionError(f"random_case({seed})") from error


@pytest.mark.usefixtures("small_tiles", "route")
def test_random_cases_agree_with_the_twin():
    run_cases(0, CASES)


@pytest.mark.full
@pytest.mark.usefixtures("small_tiles", "route")
def test_more_random_cases():
    run_cases(1_000_000, 10 * CASES)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_bfloat16_and_float16_agree_within_their_rounding(seed, route):
    for dtype, digits in ((torch.bfloat16, 8), (torch.float16, 11)):
        case = random_case(seed, dtype)
        log_p, loss = case.ours()
        true_p, true_loss = case.twin()
        # The inputs are exact, logits and sums are float32: only gradients are rounded.
        torch.testing.assert_close(log_p.double(), true_p.detach(), rtol=1e-5, atol=2e-5 * case.size)
        for got, true in zip(case.grads(loss), case.grads(true_loss), strict=True) if case.wanted else ():
            assert relative(got, true, 0.1 * float(case.weights.norm())) <= 4 * 2**-digits


@pytest.mark.usefixtures("small_tiles")
def test_both_routes_give_the_same_numbers(monkeypatch):
    if kernel.why_not():
        pytest.skip(kernel.why_not())
    for seed in range(40):
        case = random_case(seed, torch.bfloat16)
        compiled = case.ours()
        monkeypatch.setenv(kernel.SWITCH, "0")
        plain = case.ours()
        monkeypatch.delenv(kernel.SWITCH)
        for a, b in zip(compiled, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * case.size)


@pytest.mark.parametrize("count", [96, 200])  # fewer and more columns than H
def test_at_a_usual_size_float32_is_within_the_bars(count, route):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(count, 128, requires_grad=True),
        (torch.randn(20_000, 128) * 0.1).requires_grad_(),
    )
    rows, targets = torch.arange(count), torch.randint(0, 20_000, (count,))
    case = Case(hidden, weight, rows, targets, torch.rand(count), {"softcap": None, "scale": 1.0})
    case.wanted = [hidden, weight]
    loss, true = case.ours()[1], case.twin()[1]
    assert abs(float(loss.detach()) / float(true.detach()) - 1) < 1e-6
    for got, expected in zip(case.grads(loss), case.grads(true), strict=True):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("count", [1, 3, 7])
def test_few_rows_add_up_a_whole_vocabulary_without_drift(count):
    """Rows of a head have much in common, which the gradient doesn't: an error of the sum is many times that of it."""
    torch.manual_seed(0)
    weight = (torch.randn(49_152, 64) * 0.1 + torch.randn(64)).requires_grad_()
    hidden, rows = torch.randn(count, 64, requires_grad=True), torch.arange(count)
    targets = torch.randint(0, len(weight), (count,))
    case = Case(hidden, weight, rows, targets, torch.ones(count), {"softcap": None, "scale": 1.0})
    case.wanted = [hidden]
    assert relative(case.grads(case.ours()[1])[0], case.grads(case.twin()[1])[0]) < 5e-6


class Held(TorchDispatchMode):
    """The most bytes that tensors made within it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t._base is None and t.untyped_storage().data_ptr() not in self.known:
                self._add(t.untyped_storage())
        return out

    def _add(self, storage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        self.known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_whole_vocabulary_is_held_for_as_many_rows_as_there_is_memory(softcap, monkeypatch):
    monkeypatch.setattr(passes, "launches_are_costly", lambda device: True)
    monkeypatch.setattr(full_vocab, "LEAST_ROWS", 16)
    hidden, weight = torch.randn(400, 16), torch.randn(5000, 16)
    targets, memory = torch.randint(0, 5000, (400,)), 2 << 20  # all logits: 8 MB
    with Held() as held:
        selective_cross_entropy(
            hidden.requires_grad_(), weight.requires_grad_(), torch.arange(400), targets, torch.ones(400),
            softcap=softcap, memory=memory,
        )  # fmt: skip
    assert memory / 2 < held.most < 1.25 * memory + 2 * weight.nbytes


def confident(dtype: torch.dtype = torch.bfloat16) -> Case:
    """Rows that predict their target with p > 0.99, and some that don't."""
    torch.manual_seed(3)
    weight = (torch.randn(6000, 96) * 0.6).to(dtype)
    targets = torch.randint(0, 6000, (200,))
    away = torch.linspace(0.3, 0.75, 200)[:, None]
    hidden = (weight[targets].float() * away + torch.randn(200, 96) * 0.25).to(dtype)
    case = Case(hidden.requires_grad_(), weight.requires_grad_(), torch.arange(200), targets, torch.ones(200),
                {"softcap": None, "scale": 1.0})  # fmt: skip
    case.wanted = [hidden, weight]
    return case


def row_errors(got: Tensor, true: Tensor, rows: Tensor) -> Tensor:
    return ((got - true).norm(dim=1) / true.norm(dim=1))[rows]


def test_gradients_of_confident_rows_keep_their_digits_in_bfloat16(route):
    case = confident()
    log_p, loss = case.ours()
    true_p, true_loss = case.twin()
    sure = (true_p.exp() > 0.99) & (true_p.exp() < 1 - 1e-9)
    assert sure.sum() > 30
    (got, _), (true, _) = case.grads(loss), case.grads(true_loss)
    assert row_errors(got, true, sure).median() < 0.005
    assert (log_p.double() / true_p.detach() - 1)[sure].abs().max() < 1e-3
    # The test can tell: the usual way is off by several times that.
    usual = torch.nn.functional.cross_entropy(
        (case.hidden @ case.weight.T).float(), case.targets, reduction="sum"
    )
    assert row_errors(case.grads(usual)[0], true, sure).median() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_far_below_the_rest_are_shifted_by_the_maximum(dtype, route):
    hidden = torch.eye(4).to(dtype) * 8
    weight = (torch.arange(40).reshape(10, 4) * 8.0).to(dtype).requires_grad_()
    targets = torch.tensor([0, 9, 0, 3])
    case = Case(hidden.requires_grad_(), weight, torch.arange(4), targets, torch.ones(4),
                {"softcap": None, "scale": 1.0})  # fmt: skip
    case.wanted = [hidden, weight]
    log_p, loss = case.ours()
    true_p, true_loss = case.twin()
    assert true_p.min() < -2000
    torch.testing.assert_close(log_p.double(), true_p.detach(), rtol=1e-6, atol=1e-5)
    for got, true in zip(case.grads(loss), case.grads(true_loss), strict=True):
        assert relative(got, true) < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.usefixtures("route")
def test_float16_holds_a_target_that_outweighs_all_else():
    """Of a row with two targets one is certain: beside the other's gradient all other terms are next to nothing."""
    hidden, weight = torch.eye(1, 4).half() * 8, torch.zeros(50, 4).half()
    weight[3, 0] = 4.0  # a logit of 32
    case = Case(hidden.requires_grad_(), weight.requires_grad_(), torch.zeros(2, dtype=torch.int64),
                torch.tensor([3, 7]), torch.ones(2), {"softcap": None, "scale": 1.0})  # fmt: skip
    case.wanted = [hidden, weight]
    for got, true in zip(case.grads(case.ours()[1]), case.grads(case.twin()[1]), strict=True):
        assert relative(got, true) < 2**-9


def test_a_masked_vocabulary_and_not_a_number_come_through():
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)
    bias = torch.tensor([0, -torch.inf, 0, 0, -torch.inf])
    log_p = log_probs(hidden, weight, torch.tensor([0, 1]), torch.tensor([2, 0]), bias=bias)
    kept = torch.tensor([0, 2, 3])
    rest = torch.log_softmax(hidden @ weight[kept].T, -1)
    torch.testing.assert_close(log_p, torch.stack([rest[0, 1], rest[1, 0]]))
    hidden[1, 0] = torch.nan
    log_p = log_probs(hidden, weight, torch.tensor([0, 1]), torch.tensor([2, 0]))
    assert not log_p[0].isnan()
    assert log_p[1].isnan()


@pytest.mark.usefixtures("route")
def test_a_masked_target_has_no_probability():
    """Its shift is −∞, so every sum is NaN at first: the column is computed again, shifted by its maximum."""
    bias = torch.tensor([0, -torch.inf, 0, 0, -torch.inf])
    rows, targets = torch.tensor([0, 1]), torch.tensor([1, 4])
    assert (
        log_probs(torch.randn(2, 4), torch.randn(5, 4), rows, targets, bias=bias).tolist() == [-torch.inf] * 2
    )


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_otherwise_in_memory_is_read_the_same(dtype):
    """Narrow indices, and tensors with gaps: the compiled kernel reads plain memory."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 34, dtype=dtype), torch.randn(300, 34, dtype=dtype)
    rows, targets, weights, bias = (
        torch.arange(40),
        torch.randint(0, 300, (40,)),
        torch.rand(40),
        torch.randn(300),
    )

    def gaps(t: Tensor) -> Tensor:
        return torch.stack((t, t.flip(0)), -1)[..., 0]

    plain = selective_cross_entropy(hidden, weight, rows, targets, weights, bias=bias)
    for index in (torch.int32, torch.int16):
        edges = (gaps(rows.to(index)), gaps(targets.to(index)), gaps(weights))
        other = selective_cross_entropy(gaps(hidden), weight, *edges, bias=gaps(bias))
        torch.testing.assert_close(other, plain, rtol=0, atol=0)
        more = {"ranks": True, "entropy": True}
        given = head_values(gaps(hidden), LogitHead(weight, gaps(bias)), *edges[:2], **more)
        same = head_values(hidden, LogitHead(weight, bias), rows, targets, **more)
        torch.testing.assert_close(given, same, rtol=0, atol=0)


def test_the_kernel_gets_a_bias_without_gaps():
    marks = Marks(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    head = LogitHead(torch.randn(5, 4), torch.randn(10)[::2])
    given = kernel.SweepInput(head, 0, 64, torch.zeros(64), marks).arguments[2]
    assert given.is_contiguous()
    assert given.equal(head.bias)


@pytest.mark.usefixtures("route")
def test_the_default_dtype_does_not_matter():
    case = confident()
    usual = case.ours()
    torch.set_default_dtype(torch.float64)
    try:
        other = case.ours()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(usual, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_of_a_product_and_their_slope(softcap):
    head = LogitHead(torch.randn(11, 4), torch.randn(11), softcap, scale=0.3)
    hidden = torch.randn(5, 4)
    product = (hidden @ head.weight.T + head.bias).requires_grad_()
    expected = 0.3 * product if softcap is None else softcap * torch.tanh(0.3 * product / softcap)
    z, slope = head.from_product(product)
    assert torch.allclose(z, expected)
    assert torch.allclose(head.logits(hidden), expected, atol=1e-5)
    (gradient,) = torch.autograd.grad(expected.sum(), product)
    assert torch.allclose(torch.as_tensor(slope).expand_as(gradient), gradient, atol=1e-6)


def test_a_whole_number_is_a_scale():
    case = random_case(13, torch.bfloat16)
    case.options = {"softcap": None, "scale": 2.0}
    usual = case.ours()
    case.options["scale"] = 2
    assert torch.equal(usual[0], case.ours()[0])


def test_no_edge_gives_zeros():
    case = random_case(1)
    case.rows, case.targets, case.weights = case.rows[:0], case.targets[:0], case.weights[:0]
    log_p, loss = case.ours()
    assert log_p.shape == (0,)
    assert float(loss.detach()) == 0
    assert all(not g.any() for g in case.grads(loss))


@pytest.mark.parametrize("held", [True, False])
def test_log_probs_is_differentiable_for_weights_that_depend_on_it(small_tiles, monkeypatch, held):
    """Whether exponentials wait for backward or are computed again there."""
    passes_made = []
    real = passes.run_head
    monkeypatch.setattr(
        "ygivenx.head.selective.run_head", lambda *a, **k: passes_made.append(1) or real(*a, **k)
    )
    if not held:
        monkeypatch.setattr(passes.HeadPass, "add_gradients", lambda self, weights: False)

    def preference(log_p: Tensor) -> Tensor:  # a DPO-like loss: two groups of edges against each other
        half = len(log_p) // 2
        return -torch.nn.functional.logsigmoid(0.1 * (log_p[:half].sum() - log_p[half:].sum()))

    cases = [c for c in map(random_case, range(30)) if c.wanted and len(c.rows) >= 2]
    for case in cases:
        case.z_loss = 0
        head = LogitHead(case.weight, case.bias, **case.options)
        more = {"ranks": len(case.rows) % 2 == 0, "entropy": True}
        got = head_values(case.hidden, head, case.rows, case.targets, **more).log_p
        loss, true = preference(got), preference(case.twin()[0])
        exact = case.grads(true)
        for factor in (1, 2):  # the second backward finds nothing held
            for a, b in zip(case.grads(factor * loss, retain_graph=True), exact, strict=True):
                assert relative(a / factor, b, 0.1) < 2e-6 * case.size
    # Forward, and once or twice in two backwards.
    assert len(passes_made) == 3 * len(cases) if not held else len(passes_made) < 2.6 * len(cases)


def test_what_waits_for_backward_lies_in_the_gradient_of_the_head(monkeypatch):
    monkeypatch.setenv(kernel.SWITCH, "0")
    hidden = torch.randn(60, 64, requires_grad=True)
    # Small logits: a sum that overflows is made again, which is one more product.
    weight = torch.randn(3000, 64).mul(0.1).requires_grad_()
    rows, targets = torch.arange(60), torch.randint(0, 3000, (60,))
    log_p = log_probs(hidden, weight, rows, targets)
    held = log_p.grad_fn.head_pass
    place = held.into.weight.untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == place for t in held.round.waiting[1:])
    del held
    products = Products()
    with products:
        log_p.sum().backward()
    assert sum(products.sizes) == 60 * 3000 * 64  # dW alone: dH was summed up in forward
    assert weight.grad.data_ptr() == place
    with torch.no_grad(), (products := Products()):
        log_probs(hidden, weight, rows, targets)
    assert sum(products.sizes) == 60 * 3000 * 64  # the logits alone


class Products(TorchDispatchMode):
    """Multiplications of the matrix products that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.sizes.append(result.numel() * args[-2].shape[1])
        return result


def test_ranks_count_the_tokens_above_the_target(small_tiles):
    for seed in range(30):
        case = random_case(seed)
        head = LogitHead(case.weight, case.bias, **case.options)
        found = head_values(case.hidden, head, case.rows, case.targets, ranks=True)
        z = reference.all_logits(case.hidden, case.weight, bias=case.bias, **case.options).detach()
        gap = (z[case.rows] - z[case.rows].gather(1, case.targets[:, None])).abs()
        clear = ((gap > 1e-5 * case.size) | (gap == 0)).all(-1)
        true = reference.ranks(z, case.rows, case.targets)
        assert torch.equal(found.rank[clear], true[clear])
        assert len(case.rows) < 10 or clear.any() or case.options["softcap"]


@pytest.mark.parametrize("ranks", [False, True])
def test_entropies_come_with_the_pass(small_tiles, route, ranks):
    """Of confident rows, of targets far below the rest, with caps and biases."""
    for seed in range(40):
        case = random_case(seed)
        head = LogitHead(case.weight, case.bias, **case.options)
        found = head_values(case.hidden, head, case.rows, case.targets, ranks=ranks, entropy=True)
        assert (found.rank is None) != ranks
        z = reference.all_logits(case.hidden, case.weight, bias=case.bias, **case.options).detach()
        log_p = z[case.rows].log_softmax(-1)
        true = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(found.entropy.double(), true, rtol=1e-5, atol=2e-6 * case.size)


@pytest.mark.parametrize("target", [0, 1])
def test_masked_tokens_have_no_part_in_the_entropy(route, target):
    hidden, weight = torch.ones(1, 2), torch.zeros(3, 2)
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    head = LogitHead(weight, bias)
    found = head_values(hidden, head, torch.tensor([0]), torch.tensor([target]), entropy=True)
    torch.testing.assert_close(found.entropy, torch.tensor([2.0]).log())


def test_backward_again_and_with_a_factor(small_tiles):
    case = random_case(13)
    assert len(case.wanted) >= 2
    _, loss = case.ours()
    once = case.grads(loss, retain_graph=True)
    kept = [g.clone() for g in once]
    again = case.grads(3 * loss, retain_graph=True)
    for a, b, k in zip(once, again, kept, strict=True):
        assert torch.equal(a, k)
        torch.testing.assert_close(3 * a, b)
    case.grads(loss)
    with pytest.raises(RuntimeError, match="second time"):
        case.grads(loss)


def test_second_derivatives_are_refused():
    case = random_case(13)
    log_p = log_probs(case.hidden, case.weight, case.rows, case.targets, bias=case.bias, **case.options)
    for loss in (case.ours()[1], log_p.sum()):
        with pytest.raises(ModelError, match="second derivatives"):
            torch.autograd.grad(loss, case.wanted, create_graph=True)


def test_gradients_are_made_for_whoever_wants_them_only(monkeypatch):
    case = random_case(13)
    made = []
    real = passes.run_head
    monkeypatch.setattr(
        "ygivenx.head.selective.run_head", lambda *a, **k: made.append(k["needed"]) or real(*a, **k)
    )
    case.hidden.requires_grad_()
    case.weight.requires_grad_(False)
    loss = case.ours()[1]
    loss.backward()
    assert case.hidden.grad is not None
    with torch.no_grad():
        assert not case.ours()[1].requires_grad
    assert [m[:2] for m in made] == [(True, False), (False, False)]


def test_an_adapter_on_the_head_gets_its_gradients():
    case = random_case(13)
    down, up = (
        torch.randn(2, case.weight.shape[1], requires_grad=True),
        torch.randn(len(case.weight), 2, requires_grad=True),
    )
    base = case.weight.detach()
    case.wanted = [down, up]
    case.weight = base + up @ down
    got = case.grads(case.ours()[1])
    case.weight = base.double() + up.double() @ down.double()
    for a, b in zip(got, case.grads(case.twin()[1]), strict=True):
        assert relative(a, b) < 1e-5


def test_autocast_runs_the_products_in_its_dtype():
    case = random_case(13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p, loss = case.ours()
        scored = log_probs(case.hidden, case.weight, case.rows, case.targets, bias=case.bias, **case.options)
    loss.backward()
    assert case.weight.grad.dtype == case.hidden.grad.dtype == torch.float32
    hidden, weight = (t.detach().bfloat16() for t in (case.hidden, case.weight))
    expected = log_probs(hidden, weight, case.rows, case.targets, bias=case.bias, **case.options)
    torch.testing.assert_close(log_p, expected.detach())
    torch.testing.assert_close(scored, expected)
    assert not torch.equal(log_p, case.ours()[0])


def test_weights_of_a_row_that_cancel():
    hidden, weight = torch.randn(1, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    rows, targets = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 7])
    case = Case(hidden, weight, rows, targets, torch.tensor([1.0, -1.0]), {"softcap": None, "scale": 1.0})
    case.wanted = [hidden, weight]
    got, true = case.grads(case.ours()[1]), case.grads(case.twin()[1])
    for a, b in zip(got, true, strict=True):
        assert relative(a, b) < 1e-6
    torch.testing.assert_close(got[0][0], (weight[7] - weight[3]).double())


def test_memory_stays_small_whatever_the_number_of_tokens():
    assert_small_memory(1536, 64, 49_152, torch.float32)  # all logits are 288 MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "size", "vocabulary"), [(32_768, 1024, 256), (8192, 2048, 1024)])
def test_rows_come_in_rounds_that_fit_into_memory(tokens, size, vocabulary, dtype, monkeypatch):
    """Twice in float32, these rows are 128 to 256 MB. Products in bfloat16 have working memory of their own."""
    monkeypatch.setenv(kernel.SWITCH, "0")
    monkeypatch.setattr(edges, "has_products", lambda dtype: False)
    assert_small_memory(tokens, size, vocabulary, dtype)


def assert_small_memory(tokens: int, size: int, vocabulary: int, dtype: torch.dtype) -> None:
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        pytest.skip("the peak of the resident set can't be reset here")
    hidden = torch.randn(tokens, size).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size).to(dtype).requires_grad_()
    rows, targets = torch.arange(tokens), torch.randint(0, vocabulary, (tokens,))

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    selective_cross_entropy(hidden[:8], weight, rows[:8], targets[:8], torch.ones(8))[1].backward()
    hidden.grad = weight.grad = None
    reset.write_text("5")
    before = resident("VmRSS")
    selective_cross_entropy(hidden, weight, rows, targets, torch.ones(tokens))[1].backward()
    gradients = hidden.nbytes + weight.nbytes
    if dtype == torch.float16:  # in float32 until they are scaled
        gradients *= 3
    beyond = resident("VmHWM") - before - gradients
    assert beyond < 64 << 20, f"{beyond >> 20} MB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(2, 3, 4)}, "don't fit"),
        ({"hidden": torch.randn(3, 5)}, "don't fit"),
        ({"rows": torch.tensor([0, 3])}, "rows has an index outside 0..2"),
        ({"rows": torch.tensor([True, False])}, "rows are bool"),
        ({"rows": torch.tensor([0, 2], dtype=torch.uint8)}, "rows are uint8"),
        ({"targets": torch.tensor([1.0, 5.0])}, "targets are float32"),
        ({"targets": torch.tensor([-100, 1])}, "targets has an index outside 0..5"),
        ({"rows": torch.tensor([0])}, "of one length"),
        ({"weights": torch.ones(3)}, "of one length"),
        ({"weights": torch.ones(2, requires_grad=True)}, "ask for a gradient"),
        ({"bias": torch.zeros(2)}, "bias"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    good = {
        "hidden": torch.randn(3, 4), "weight": torch.randn(6, 4), "rows": torch.tensor([0, 2]),
        "targets": torch.tensor([1, 5]), "weights": torch.ones(2),
    }  # fmt: skip
    selective_cross_entropy(**good)
    with pytest.raises(ModelError, match=message):
        selective_cross_entropy(**(good | change))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """As on a machine on which the kernel was never built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    kernel._loaded.cache_clear()
    yield tmp_path
    kernel._loaded.cache_clear()


def test_without_a_compiler_torch_does_the_work(empty_cache, monkeypatch):
    monkeypatch.setenv("PATH", str(empty_cache))
    assert "no C++ compiler" in explain()["cpu bfloat16"]
    case = random_case(6, torch.bfloat16)
    torch.testing.assert_close(
        case.ours()[0].double(), case.twin()[0].detach(), rtol=1e-5, atol=2e-5 * case.size
    )


def test_a_compiler_that_fails_is_said(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in kernel.why_not()
    assert not list(empty_cache.rglob("*.so"))


def test_the_kernel_is_built_once_and_kept(empty_cache):
    if kernel.why_not():
        pytest.skip(kernel.why_not())
    (built,) = empty_cache.rglob("*.so")
    stamp = built.stat().st_mtime_ns
    kernel._loaded.cache_clear()
    assert kernel.library() is not None
    assert built.stat().st_mtime_ns == stamp
    assert list(empty_cache.rglob("*.so")) == [built]


def test_float32_takes_the_kernel_only_on_matrix_units_and_where_most_exponentials_cannot_wait(monkeypatch):
    if kernel.why_not():
        pytest.skip(kernel.why_not())
    taken = []
    real = fused.run_fused
    monkeypatch.setattr(fused, "run_fused", lambda *a, **k: taken.append(True) or real(*a, **k))
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    amx = {"amx_bf16": True}
    for units, rows, expected in ((amx, 33, 1), (amx, 32, 0), ({}, 33, 0)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units, raising=False)
        index = torch.arange(rows)
        selective_cross_entropy(hidden, weight, index, index, torch.ones(rows), memory=1)
        assert len(taken) == expected
        taken.clear()


def test_the_switch_turns_the_kernel_off(monkeypatch):
    monkeypatch.setenv(kernel.SWITCH, "0")
    assert kernel.library() is None
    assert kernel.SWITCH in explain()["cpu bfloat16"]


@pytest.mark.parametrize("has_products", [True, False])
def test_explain_names_the_products_of_bfloat16(monkeypatch, has_products):
    monkeypatch.setenv(kernel.SWITCH, "0")
    monkeypatch.setattr("ygivenx.head.selective.has_products", lambda dtype: has_products)
    assert ("products are float32" in explain()["cpu bfloat16"]) is not has_products


@pytest.mark.parametrize(
    ("kind", "features", "expected"),
    [("0x0005", "0110010100", True), ("0x0005", "0110000100", False), ("0x0002", "1111111111", False)],
)
def test_a_machine_that_gives_large_pages_back_is_recognised(tmp_path, kind, features, expected):
    (tmp_path / "virtio0").mkdir()
    (tmp_path / "virtio0" / "device").write_text(kind + "\n")
    (tmp_path / "virtio0" / "features").write_text(features + "\n")
    (tmp_path / "virtio1").mkdir()  # one that can't be read
    assert pages.returns_free_pages.__wrapped__(str(tmp_path)) is expected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_inside_a_compiled_function(backend):
    """What stands around the head is compiled, and the head gives what it gives without."""
    case = random_case(13)
    body = torch.nn.Linear(case.hidden.shape[1], case.hidden.shape[1])

    def step(x: Tensor, weight: Tensor) -> Tensor:
        hidden = body(x).tanh()
        log_p, loss = selective_cross_entropy(hidden, weight, case.rows, case.targets, case.weights)
        return loss * 2 + log_probs(hidden, weight, case.rows, case.targets).sum() + 0 * log_p.sum()

    def run(function) -> list[Tensor]:
        weight = case.weight.detach().clone().requires_grad_()
        value = function(case.hidden.detach(), weight)
        return [value.detach(), *torch.autograd.grad(value, [weight, body.weight])]

    torch._dynamo.reset()
    for got, wanted in zip(run(torch.compile(step, backend=backend)), run(step), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
