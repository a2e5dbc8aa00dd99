"""The probe: which tokens a training step really trains, with what weight, read from its gradient.

It asks nothing of the trainer. Hooks on the model's backbone and output head see each forward pass; when
backward arrives they read targets and weights from the gradient itself (see `gradients`), so labels, masks,
collators and loss functions can claim what they like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LossError
from ..models.families import decoder_of
from ..models.wrappers import innermost
from .arrays import as_array, documents_of
from .gradients import ProbedHead, RecoveredTarget, from_hidden, from_logits
from .wrapping import probed_head, uncompiled, unwrap

if TYPE_CHECKING:
    from torch import nn

# |recovered − true| per true weight, by the dtype of the logits. Tested. Where a loss rounds 1 − p itself
# (bf16, p near 1) the gradient is off by that much, and the probe reports what the gradient says.
RELATIVE_ERROR = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class ProbedToken:
    """One prediction of one forward pass.

    position: column of the predicted token in row `sequence` of micro-batch `micro_batch` (padding counts);
    input_id: the token that predicts, next_id: the one at `position` (−1 past the end).
    target and weight come from the gradient; an untrained row has target = next_id and weight 0; it is
    in units of the loss that backward was called on: Σ weights = 1 for a mean over the step.
    log_p: nats, NaN where untrained. residual: the share of its gradient that isn't a cross-entropy. document:
    number of the packed document within its row.
    attended: whether the predicted token is no padding.
    """

    micro_batch: int
    sequence: int
    position: int
    input_id: int
    next_id: int
    target: int
    weight: float
    log_p: float
    smoothing: float
    residual: float
    document: int
    attended: bool

    @property
    def trained(self) -> bool:
        return self.weight != 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What a micro-batch with gradient was fed, [B, T]; ids are −1 where only embeddings were given."""

    ids: np.ndarray
    attended: np.ndarray
    documents: np.ndarray
    found: tuple[RecoveredTarget, ...]

    @property
    def weight_sum(self) -> float:
        return math.fsum(f.weight for f in self.found)


def probe(model: nn.Module, head: nn.Module | None = None) -> Probe:
    """A context manager around one training step of any loop.

    `model` is a transformers causal model, bare or wrapped (PEFT, DDP, torch.compile), or any other module with a
    `head`: the linear layer of it [H → V] that makes logits of hidden states [B, T, H]. Everything between `with` and
    its end counts: one forward and backward, or all micro-batches of an accumulated step. Weights and gradients of the
    model are untouched.

    Raises ModelError if the model has no output embeddings and no head is given.
    """
    return Probe(model, head)


class Probe:
    """See `probe`. After the block: `tokens()`, `trained()`, `micro_batches`, `weight_sum`, `weighting`."""

    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        self.model = unwrap(model) if head is None else innermost(model)
        self._given_head = head
        self.micro_batches: list[MicroBatch] = []
        # what a gradient scaler multiplies the loss by; reported weights are free of it
        self.loss_scale = 1.0
        self.temperature = 1.0  # what the loss divides its logits by
        self._passes: list[_ForwardPass] = []
        self._declared: int | None = None  # micro-batches that the loop has announced so far
        self._open = ExitStack()
        self._embedded: Tensor | None = None

    def __enter__(self) -> Probe:
        # A hook that can't be set takes back those that were: a probe that fails to open leaves the model as it was.
        with ExitStack() as entered:
            entered.enter_context(uncompiled())
            for hook in self._hooks() if self._given_head is None else self._hooks_of(self._given_head):
                entered.callback(hook.remove)
            self._open = entered.pop_all()
        return self

    def _hooks(self) -> Iterator[Any]:
        """On a transformers model: its embeddings, its decoder, its head."""
        head = self.model.get_output_embeddings()
        form = probed_head(self.model, head)
        yield self.model.get_input_embeddings().register_forward_hook(self._on_embedding)
        yield decoder_of(self.model).register_forward_hook(
            lambda _m, a, k, out: self._on_backbone(form, head, a, k, out), with_kwargs=True
        )
        yield head.register_forward_hook(lambda m, a, out: self._on_head(m, a[0], out))

    def _hooks_of(self, head: Any) -> Iterator[Any]:
        """On any model: what it is fed, and what its head is fed, which are the hidden states."""
        form, fed = ProbedHead(head.weight, getattr(head, "bias", None), None, 1.0), dict[str, Any]()

        def keep(_model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            whole = (
                v for v in (*args, *inputs.values()) if isinstance(v, Tensor) and not v.is_floating_point()
            )
            fed.clear()
            fed.update({"input_ids": next((v for v in whole if v.dim() == 2), None), **inputs})

        yield self.model.register_forward_pre_hook(keep, with_kwargs=True)
        yield head.register_forward_pre_hook(lambda m, a: self._on_backbone(form, m, (), fed, (a[0],)))
        yield head.register_forward_hook(lambda m, a, out: self._on_head(m, a[0], out))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The loop may have announced its micro-batches (`micro_batch`), whose passes then belong together. Otherwise
        # each pass that backward reached is one. An error of ours never hides one of the loop's own.
        self._open.close()
        if self._declared is None:
            self.micro_batches = [p.finish(self.loss_scale) for p in self._passes if p.reached]
        else:
            groups = [[p for p in self._passes if p.group == g] for g in range(self._declared)]
            self.micro_batches = [merged([p.finish(self.loss_scale) for p in g]) for g in groups]
        self._passes = [p.release() for p in self._passes]
        broken = next((p.error for p in self._passes if p.error is not None), None)
        if broken is not None and kind is None:
            raise broken

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch: its forward passes count as one, however many there are, none too.

        Without it each forward pass that backward reaches is a micro-batch.
        """
        self._declared = (self._declared or 0) + 1
        yield

    @property
    def reached(self) -> bool:
        """Whether backward has reached a forward pass."""
        return any(p.reached for p in self._passes)

    def tokens(self) -> list[ProbedToken]:
        """A row for each prediction of each forward pass that backward reached, trained or not, in order.

        Raises LossError if there was none: no forward pass with gradient, or no backward.
        """
        if not self.reached:
            seen = f"{len(self._passes)} forward pass(es) with gradient"
            raise LossError(
                "no gradient reached the model inside the probe",
                why=f"{seen}, and backward was never called on a loss that depends on them",
                fix="put the whole step, forward and backward, inside the `with` block",
            )
        return [row for i, batch in enumerate(self.micro_batches) for row in _rows(i, batch)]

    def trained(self) -> list[ProbedToken]:
        """The rows with a weight."""
        return [row for row in self.tokens() if row.trained]

    @property
    def weight_sum(self) -> float:
        """Σ weights: 1 if the loss is a mean over the whole step, the token count if it is a sum."""
        return math.fsum(b.weight_sum for b in self.micro_batches)

    @property
    def weighting(self) -> str:
        """How weights depend on tokens: "none", "uniform", "probability" (w ∝ p, as in DFT) or "varied"."""
        rows = self.trained()
        if not rows:
            return "none"
        weights = np.array([r.weight for r in rows])
        p = np.exp([r.log_p for r in rows])
        # 2 % apart are alike: in half precision weights are read from gradients of three digits.
        for name, unit in (("uniform", np.ones_like(p)), ("probability", p)):
            ratio = weights / np.maximum(unit, 1e-30)
            if np.ptp(ratio) <= 2e-2 * abs(np.median(ratio)):
                return name
        return "varied"

    @property
    def smoothing(self) -> float:
        """The label smoothing of the loss (the median over its trained rows)."""
        return float(
            np.median([f.smoothing for b in self.micro_batches for f in b.found if f.weight] or [0.0])
        )

    def _on_embedding(self, _module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
        self._embedded = args[0].detach()

    def _on_backbone(
        self, form: ProbedHead, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if not torch.is_grad_enabled():
            return
        if not hidden.requires_grad:
            if not any(p.requires_grad for p in head.parameters()):
                return  # nothing is trained: backward has to fail here as it does without the probe
            hidden.requires_grad_(True)  # only the head is trained
        inputs = dict(kwargs)
        if args:
            inputs.setdefault("input_ids", args[0])
        ids = inputs.get("input_ids")
        device = hidden.device.type
        rounded = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        form = replace(form, rounded=rounded, scale=form.scale / self.temperature)
        started = _ForwardPass.of(hidden, self._embedded if ids is None else ids, inputs, form)
        started.group = -1 if self._declared is None else self._declared - 1
        self._passes.append(started)

    def _on_head(self, head: nn.Module, x: Tensor, output: Tensor) -> None:
        if not (self._passes and torch.is_grad_enabled() and output.requires_grad):
            return
        # Several passes may come before their heads.
        current = next((p for p in reversed(self._passes) if p.contains(x)), self._passes[-1])
        rows = current.locate(x)
        if rows is not None:
            current.watch(head, x.detach(), output, rows)


@dataclass
class _ForwardPass:
    """One forward pass: what was fed, and what backward has shown so far."""

    hidden: Tensor | None  # [B, T, H], detached
    ids: np.ndarray
    attended: np.ndarray
    documents: np.ndarray
    form: ProbedHead
    group: int = -1
    reached: bool = False
    error: Exception | None = None
    found: list[RecoveredTarget] = field(default_factory=list)
    by_logits: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @classmethod
    def of(cls, hidden: Tensor, ids: Tensor | None, inputs: dict[str, Any], form: ProbedHead) -> _ForwardPass:
        shape = tuple(hidden.shape[:2])
        known = _fit(ids, shape, -1)
        mask = inputs.get("attention_mask")
        attended = _fit(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, shape, 1).astype(bool)
        documents = documents_of(inputs.get("position_ids"), attended)
        started = cls(hidden.detach(), known, attended, documents, form, by_logits=np.zeros(known.size, bool))
        hidden.register_hook(started.guarded_hook(started.on_hidden))
        return started

    def contains(self, x: Tensor) -> bool:
        """Whether x lies in this pass's hidden states."""
        assert self.hidden is not None
        # Slices such as hidden[:, :-1] are views, so the memory tells, where values could be equal by chance.
        return x.untyped_storage().data_ptr() == self.hidden.untyped_storage().data_ptr()

    def locate(self, x: Tensor) -> np.ndarray | None:
        """Which flat positions the rows of a head's input are; None if that is unknown."""
        hidden = self.hidden
        assert hidden is not None
        flat = np.arange(self.ids.size).reshape(self.ids.shape)
        if x.shape[:-1] == hidden.shape[:-1]:
            return flat.ravel()
        if x.dim() == 3 and x.shape[0] == hidden.shape[0] and x.shape[1] < hidden.shape[1]:
            for span in (slice(-x.shape[1], None), slice(None, x.shape[1])):  # logits_to_keep, hidden[:, :-1]
                if torch.equal(x.to(hidden.dtype), hidden[:, span]):
                    return flat[:, span].ravel()
        return None

    def watch(self, head: nn.Module, x: Tensor, output: Tensor, rows: np.ndarray) -> None:
        # torch counts changes in place; the count tells later whether these are still the logits.
        version, logits = output._version, output.detach()

        def on_logits(grad: Tensor) -> None:
            # A loss that scales its logits in place has overwritten them: compute them once more.
            raw = logits if logits._version == version else type(head).forward(head, x)
            width = raw.shape[-1]
            found = from_logits(raw.reshape(-1, width), grad.reshape(-1, width), self.form)
            self.found += [f._replace(row=int(rows[f.row])) for f in found]
            self.by_logits[rows] = True
            self.reached = True

        output.register_hook(self.guarded_hook(on_logits))

    def on_hidden(self, grad: Tensor) -> None:
        self.reached = True
        hidden = self.hidden
        assert hidden is not None
        left = torch.from_numpy(~self.by_logits).to(grad.device)
        grad = grad.reshape(-1, grad.shape[-1]) * left[:, None]
        hints = torch.from_numpy(_next(self.ids).ravel()).to(grad.device)
        # A fused loss may leave out an adapter on the head.
        forms = [self.form, *(replace(self.form, weight=w) for w in (self.form.unadapted,) if w is not None)]
        readings = (from_hidden(hidden.reshape(-1, hidden.shape[-1]), grad, form, hints) for form in forms)
        # The reading that leaves less unexplained is the one that the loss used.
        self.found += min(readings, key=lambda found: sum(f.residual for f in found))

    def guarded_hook(self, read: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """A tensor hook that reads the gradient and changes nothing; an error waits for the end of the probe."""

        def hook(grad: Tensor) -> None:
            try:
                with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                    read(grad.detach())
            except Exception as error:
                self.error = error

        return hook

    def release(self) -> _ForwardPass:
        self.hidden = None
        return self

    def finish(self, loss_scale: float) -> MicroBatch:
        scaled = (f._replace(weight=f.weight / loss_scale) for f in self.found)
        found = tuple(sorted(scaled, key=lambda f: (f.row, f.target)))
        return MicroBatch(self.ids, self.attended, self.documents, found)


def merged(parts: list[MicroBatch]) -> MicroBatch:
    """Several forward passes as one batch: over the same ids their weights add up, other rows come below."""
    rows = max_width = 0
    # A loss may run the same rows several times, as with one pass per term: these are one row of the batch. Rows of
    # other passes are put below.
    blocks: list[tuple[MicroBatch, int]] = []  # and the row that it begins at
    for part in parts:
        if not any(np.array_equal(part.ids, b.ids) for b, _ in blocks):
            blocks.append((part, rows))
            rows, max_width = rows + len(part.ids), max(max_width, part.ids.shape[1])
    shape = (rows, max_width)
    whole = MicroBatch(np.full(shape, -1), np.zeros(shape, bool), np.zeros(shape, np.int64), ())
    for block, at in blocks:
        here = slice(at, at + len(block.ids)), slice(block.ids.shape[1])
        whole.ids[here], whole.attended[here], whole.documents[here] = (
            block.ids,
            block.attended,
            block.documents,
        )
    found: dict[tuple[int, int], RecoveredTarget] = {}
    for part in parts:
        at = next(at for b, at in blocks if np.array_equal(part.ids, b.ids))
        for f in part.found:
            row, position = divmod(f.row, part.ids.shape[1])
            f = f._replace(row=(at + row) * max_width + position)
            known = found.get((f.row, f.target))
            found[f.row, f.target] = f if known is None else known._replace(weight=known.weight + f.weight)
    return replace(whole, found=tuple(sorted(found.values(), key=lambda f: (f.row, f.target))))


def _fit(values: Tensor | None, shape: tuple[int, ...], missing: int) -> np.ndarray:
    """int64 [B, T]; what is shorter (virtual prompt tokens come first) is filled up from the left."""
    out = np.full(shape, missing, np.int64)
    if values is not None:
        given = as_array(values).reshape(-1, values.shape[-1])[:, -shape[1] :]
        out[:, shape[1] - given.shape[1] :] = given
    return out


def _next(ids: np.ndarray) -> np.ndarray:
    return np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], 1)


def _rows(number: int, batch: MicroBatch) -> list[ProbedToken]:
    width = batch.ids.shape[1]
    following = _next(batch.ids)
    by_row: dict[int, list[RecoveredTarget]] = {}
    for f in batch.found:
        by_row.setdefault(f.row, []).append(f)
    rows = []
    for flat in range(batch.ids.size):
        s, u = divmod(flat, width)
        after = min(u + 1, width - 1)
        untrained = RecoveredTarget(flat, int(following[s, u]), 0.0, math.nan, 0.0, 0.0)
        # The last position predicts nothing, unless a loss makes it.
        if u + 1 == width and flat not in by_row:
            continue
        rows += [
            ProbedToken(
                number, s, u + 1, int(batch.ids[s, u]), int(following[s, u]),
                f.target if f.target >= 0 else int(following[s, u]), f.weight, f.log_p,
                f.smoothing, f.residual, int(batch.documents[s, after]), bool(batch.attended[s, after]),
            )
            for f in by_row.get(flat, [untrained])
        ]  # fmt: skip
    return rows
