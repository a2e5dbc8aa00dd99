"""The probe: which tokens a training step really trains, with what weight, read from its gradient.

It asks nothing of the trainer. Hooks on the model's backbone and output head see each forward pass; when
backward arrives they read targets and weights from the gradient itself (see `gradients`), so labels, masks,
collators and loss functions can claim what they like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LossError, ModelError
from .gradients import Found, HeadForm, from_hidden, from_logits

if TYPE_CHECKING:
    from torch import nn

# |recovered − true| per true weight, by the dtype of the logits. Tested. Where a loss rounds 1 − p itself
# (bf16, p near 1) the gradient is off by that much, and the probe reports what the gradient says.
RELATIVE_ERROR = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
# A row that a weighted cross-entropy leaves unexplained by more than this carries another term.
FOREIGN_TERM = 0.3


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One prediction of one forward pass.

    position: column of the predicted token in row `sequence` of micro-batch `micro_batch` (padding counts);
    input_id: the token that predicts, next_id: the one at `position` (−1 past the end).
    target and weight come from the gradient; an untrained row has target = next_id and weight 0; it is
    in units of the loss that backward was called on: Σ weights = 1 for a mean over the step.
    log_p: nats, NaN where untrained. document: number of the packed document within its row.
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
    """What one forward pass with gradient was fed, [B, T]; ids are −1 where only embeddings were given."""

    ids: np.ndarray
    attended: np.ndarray
    documents: np.ndarray
    found: tuple[Found, ...]

    @property
    def weight_sum(self) -> float:
        return math.fsum(f.weight for f in self.found)


def probe(model: nn.Module) -> Probe:
    """A context manager around one training step of any loop.

    `model` is a transformers causal model, bare or wrapped (PEFT, DDP, torch.compile). Everything between
    `with` and its end counts: one forward and backward, or all micro-batches of an accumulated step.
    Weights and gradients of the model are untouched.

    Raises ModelError if the model has no output embeddings.
    """
    return Probe(model)


class Probe:
    """See `probe`. After the block: `tokens()`, `trained()`, `micro_batches`, `weight_sum`, `weighting`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.micro_batches: list[MicroBatch] = []
        self._passes: list[_Pass] = []
        self._hooks: list[Any] = []
        self._embedded: Tensor | None = None

    def __enter__(self) -> Probe:
        head, backbone = self.model.get_output_embeddings(), backbone_of(self.model)
        form = _head_form(self.model, head)
        self._hooks = [
            self.model.get_input_embeddings().register_forward_hook(self._on_embedding),
            backbone.register_forward_hook(
                lambda _m, a, k, out: self._on_backbone(form, a, k, out), with_kwargs=True
            ),
            head.register_forward_hook(lambda m, a, out: self._on_head(m, a[0], out)),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self.micro_batches = [p.finish() for p in self._passes if p.reached]
        self._passes = [p.release() for p in self._passes]

    def tokens(self) -> list[TokenRow]:
        """A row for each prediction of each forward pass that backward reached, trained or not, in order.

        Raises LossError if there was none: no forward pass with gradient, or no backward.
        """
        if not self.micro_batches:
            seen = f"{len(self._passes)} forward pass(es) with gradient"
            raise LossError(
                "no gradient reached the model inside the probe",
                why=f"{seen}, and backward was never called on a loss that depends on them",
                fix="put the whole step, forward and backward, inside the `with` block",
            )
        return [row for i, batch in enumerate(self.micro_batches) for row in _rows(i, batch)]

    def trained(self) -> list[TokenRow]:
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
        for name, unit in (("uniform", np.ones_like(p)), ("probability", p)):
            ratio = weights / np.maximum(unit, 1e-30)
            if np.ptp(ratio) <= 2e-2 * abs(np.median(ratio)):
                return name
        return "varied"

    @property
    def smoothing(self) -> float:
        """The label smoothing of the loss (the median over its trained rows)."""
        return float(np.median([f.smoothing for b in self.micro_batches for f in b.found] or [0.0]))

    def _on_embedding(self, _module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
        self._embedded = args[0].detach()

    def _on_backbone(self, form: HeadForm, args: tuple, kwargs: dict, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if not torch.is_grad_enabled():
            return
        if not hidden.requires_grad:  # only the head is trained
            hidden.requires_grad_(True)
        inputs = dict(kwargs)
        if args:
            inputs.setdefault("input_ids", args[0])
        ids = inputs.get("input_ids")
        self._passes.append(_Pass.of(hidden, self._embedded if ids is None else ids, inputs, form))

    def _on_head(self, head: nn.Module, x: Tensor, output: Tensor) -> None:
        if not (self._passes and torch.is_grad_enabled() and output.requires_grad):
            return
        current = self._passes[-1]
        rows = current.locate(x)
        if rows is not None:
            current.watch(head, x.detach(), output, rows)


@dataclass
class _Pass:
    """One forward pass: what was fed, and what backward has told so far."""

    hidden: Tensor | None  # [B, T, H], detached
    ids: np.ndarray
    attended: np.ndarray
    documents: np.ndarray
    form: HeadForm
    reached: bool = False
    found: list[Found] = field(default_factory=list)
    by_logits: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @classmethod
    def of(cls, hidden: Tensor, ids: Tensor | None, inputs: dict[str, Any], form: HeadForm) -> _Pass:
        shape = tuple(hidden.shape[:2])
        known = _fit(ids, shape, -1)
        mask = inputs.get("attention_mask")
        attended = _fit(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, shape, 1).astype(bool)
        documents = documents_of(inputs.get("position_ids"), attended)
        made = cls(hidden.detach(), known, attended, documents, form, by_logits=np.zeros(known.size, bool))
        hidden.register_hook(_quiet(made.on_hidden))
        return made

    def locate(self, x: Tensor) -> np.ndarray | None:
        """Which flat positions the rows of a head's input are; None if that can't be told."""
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
        version, logits = output._version, output.detach()

        def on_logits(grad: Tensor) -> None:
            # A loss that scales its logits in place has overwritten them: compute them once more.
            raw = logits if logits._version == version else type(head).forward(head, x)
            width = raw.shape[-1]
            found = from_logits(raw.reshape(-1, width), grad.reshape(-1, width), self.form)
            self.found += [f._replace(row=int(rows[f.row])) for f in found]
            self.by_logits[rows] = True
            self.reached = True

        output.register_hook(_quiet(on_logits))

    def on_hidden(self, grad: Tensor) -> None:
        self.reached = True
        hidden = self.hidden
        assert hidden is not None
        left = torch.from_numpy(~self.by_logits).to(grad.device)
        grad = grad.reshape(-1, grad.shape[-1]) * left[:, None]
        hints = torch.from_numpy(_next(self.ids).ravel()).to(grad.device)
        self.found += from_hidden(hidden.reshape(-1, hidden.shape[-1]), grad, self.form, hints)

    def release(self) -> _Pass:
        self.hidden = None
        return self

    def finish(self) -> MicroBatch:
        found = tuple(sorted(self.found, key=lambda f: (f.row, f.target)))
        return MicroBatch(self.ids, self.attended, self.documents, found)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside DDP, FSDP, torch.compile and PEFT wrappers; raises ModelError if none."""
    seen: Any = model
    while True:
        inner = getattr(seen, "_orig_mod", None) or getattr(seen, "module", None)
        if inner is None and hasattr(seen, "get_base_model"):
            inner = seen.get_base_model()
        if inner is None:
            break
        seen = inner
    if not hasattr(seen, "get_output_embeddings") or seen.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} has no output embeddings",
            why="the probe reads the gradient at the output head",
            fix="pass the causal language model itself, such as trainer.model",
        )
    return seen


def backbone_of(model: Any) -> nn.Module:
    """The part of a transformers model that ends in the final norm: its decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model.base_model if decoder is None or decoder is model else decoder


def leakage(model: nn.Module, inputs: dict[str, Any], groups: np.ndarray) -> np.ndarray:
    """How much each group of tokens depends on the others, float64 [G, G]: ∂ hidden / ∂ embedding.

    inputs: what the model would be fed (labels are ignored). groups int [B, T]: the document of each token,
    numbered from 0 over the whole batch, −1 for tokens of none. Entry [g, k] is the norm of the gradient of a
    random projection of g's last hidden states at k's embeddings, relative to [g, g]: exactly 0 where
    attention keeps them apart. Gradients, weights and random state of the model are left alone.
    """
    core = unwrap(model)
    kept: list[Tensor] = []

    def keep(_m: nn.Module, _a: tuple, out: Tensor) -> Tensor:
        kept.append(out.detach().requires_grad_(True))
        return kept[-1]

    arguments = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", "num_items_in_batch")}
    hook = core.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            hidden = backbone_of(core)(**{**arguments, "use_cache": False})[0]
    finally:
        hook.remove()
    return _dependence(hidden, kept[-1], groups)


def _dependence(hidden: Tensor, embedded: Tensor, groups: np.ndarray) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(hidden.shape, generator=generator).to(hidden)
    count = int(groups.max()) + 1
    matrix = np.zeros((count, count))
    members = [torch.from_numpy(groups == g).to(hidden.device) for g in range(count)]
    for g, own in enumerate(members):
        total = (hidden * direction)[own].sum()
        (grad,) = torch.autograd.grad(total, embedded, retain_graph=True)
        matrix[g] = [float(grad[other].double().norm()) for other in members]
    return matrix / np.maximum(np.diag(matrix)[:, None], 1e-300)


def _head_form(model: Any, head: Any) -> HeadForm:
    from ..models.model import softcap_and_scale

    return HeadForm(head.weight, getattr(head, "bias", None), *softcap_and_scale(model))


def _quiet(read: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A tensor hook that reads the gradient and changes nothing."""

    def hook(grad: Tensor) -> None:
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            read(grad.detach())

    return hook


def _fit(values: Tensor | None, shape: tuple[int, ...], missing: int) -> np.ndarray:
    """int64 [B, T]; what is shorter (virtual prompt tokens come first) is filled up from the left."""
    out = np.full(shape, missing, np.int64)
    if values is not None:
        given = values.detach().cpu().numpy().reshape(-1, values.shape[-1])[:, -shape[1] :]
        out[:, shape[1] - given.shape[1] :] = given
    return out


def documents_of(position_ids: Any, attended: np.ndarray) -> np.ndarray:
    """int64 [B, T]: the packed document of each token: a new one begins where positions restart at 0."""
    if position_ids is None or np.ndim(position_ids) != 2:
        return np.zeros(attended.shape, np.int64)
    positions = np.broadcast_to(np.asarray(position_ids), attended.shape)
    starts = (positions == 0) & attended
    return np.maximum(np.cumsum(starts, 1) - 1, 0)


def _next(ids: np.ndarray) -> np.ndarray:
    return np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], 1)


def _rows(number: int, batch: MicroBatch) -> list[TokenRow]:
    width = batch.ids.shape[1]
    following = _next(batch.ids)
    by_row: dict[int, list[Found]] = {}
    for f in batch.found:
        by_row.setdefault(f.row, []).append(f)
    rows = []
    for flat in range(batch.ids.size):
        s, u = divmod(flat, width)
        after = min(u + 1, width - 1)
        untrained = Found(flat, int(following[s, u]), 0.0, math.nan, 0.0, 0.0)
        if u + 1 == width and flat not in by_row:
            continue
        rows += [
            TokenRow(
                number, s, u + 1, int(batch.ids[s, u]), int(following[s, u]), f.target, f.weight, f.log_p,
                f.smoothing, f.residual, int(batch.documents[s, after]), bool(batch.attended[s, after]),
            )
            for f in by_row.get(flat, [untrained])
        ]  # fmt: skip
    return rows
