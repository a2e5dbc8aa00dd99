"""`yx.Trainer` on rated replies: DPO and its kin, with a reference that is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..forest import MAX_TOKENS
from ..models.position_limits import PositionLimits
from ..objective import Loss
from ..objectives import kl_estimate, kto_kl
from ..targets import LogProbs, Targets, log_probs
from . import runs
from .rated import Objective, RatedBatch, RatedPacks
from .trainer import Trainer, data_seed

T = TypeVar("T")

REFERENCE = (
    "reference-{}.safetensors"  # beside the checkpoints; by the packs and the model that it belongs to
)
# What is measured: sums, then counts, in pairs.
MEASURES = ("loss", "margin", "accuracy", "kl", "chosen_nats", "rejected_nats")


class PreferenceTrainer(Trainer):
    """yx.Trainer on rated replies: `RatedExample`s, as `yx.PreferenceEncoder` makes them.

    objective: dpo, ipo, orpo, simpo, kto, reward_weighted, grpo, dapo, rloo or gspo, or one with options:
    `{"name": "dpo", "beta": 0.3}`. See docs/objectives.md. A row's loss is the mean over its pairs of a better and a
    worse reply, or over its replies, and a step's the mean over its rows by their weights, over all micro-batches and
    ranks; dapo's is over tokens.

    reference: a model of its own; by default the trained one as it is before its first step, or without its adapters
    if it has some (PEFT). Its log-probabilities are computed once and kept in memory, and in the output directory for
    whoever resumes there.

    Evaluation gives the loss; the margin, log π/π_ref of the better reply less that of the worse one, in nats (of means
    without π_ref for orpo and simpo); accuracy, the share of pairs with a margin above 0; log Pr of good and of bad
    replies per token; and kl, Schulman's estimate of the divergence from the reference at the tokens of all replies, or
    from the policy that sampled them.

    Other arguments and errors are those of `yx.Trainer`; there is no denominator.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: transformers.TrainingArguments | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Any = None,
        *,
        objective: str | Mapping[str, Any] = "dpo",
        reference: nn.Module | None = None,
        max_tokens: int = MAX_TOKENS,
        **kwargs: Any,
    ) -> None:
        options: dict[str, Any] = {"name": objective} if isinstance(objective, str) else dict(objective)
        self.objective = Objective(str(options.pop("name", "dpo")), options)
        self._reference_model, self._reference = reference, dict[int, list[Tensor]]()
        self._measures = np.zeros((len(MEASURES), 2))
        super().__init__(model, args, train_dataset, eval_dataset, max_tokens=max_tokens, **kwargs)

    def _packs(self, items: Iterable[Any], args: transformers.TrainingArguments) -> Any:
        packs = RatedPacks(items, objective=self.objective, max_tokens=self.max_tokens, seed=data_seed(args))
        if not packs.rows:
            raise ConfigError(
                f"nothing to learn from: {packs}",
                fix="replies of different rewards to one prompt; kto and reward_weighted learn from single ones, and "
                "grpo, dapo, rloo and gspo from single ones with logged advantages",
            )
        packs.fill(args.world_size)
        return packs

    def _held_out(self, data: Any, args: transformers.TrainingArguments) -> Any:
        if isinstance(data, dict):
            return {name: self._held_out(part, args) for name, part in data.items()}
        return data if isinstance(data, RatedPacks) else self._packs(data, args)

    def _refuse_unreadable(self, model: nn.Module) -> None:
        limits = PositionLimits.of(model)
        for packs in self._all_packs() if limits.unchanged else ():
            for row in packs.rows:
                for name, reply in zip(row.names, row.replies, strict=True):
                    lengths = np.array([len(s) for s in reply], np.int64)
                    limits.refuse(lengths, where=f"row {row.index}, {name}")

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "objective": str(self.objective)}

    # -- the reference -------------------------------------------------------------------------------------

    def train_from(self, path: Path | None, **kwargs: Any) -> Any:
        """As Trainer's; what the reference gives is computed before, or read."""
        for packs in self._all_packs():
            self._refer(packs)
        return super().train_from(path, **kwargs)

    def _all_packs(self) -> Iterator[RatedPacks]:
        held_out = self.eval_dataset
        yield from held_out.values() if isinstance(held_out, dict) else [held_out] if held_out else []
        yield self.train_dataset

    def _refer(self, packs: RatedPacks) -> list[Tensor]:
        """log Pr under the reference, float32 [M], of the targets of each pack, and behind them of mismatched ones."""
        if not self.objective.has_reference:
            return []
        if id(packs) not in self._reference:
            if self.state.global_step and self._reference_model is None and not self._has_adapters:
                raise ConfigError(
                    "the reference for these rows is the model before its first step, which is gone",
                    fix="give them as eval_dataset when the trainer is made, or a model as reference=",
                )
            found = self._read_reference(packs)
            # The first rank may have written the file after another one has looked: they decide together.
            everywhere = all(self._gathered(bool(found)))
            self._reference[id(packs)] = found if everywhere else self._computed_reference(packs)
        return self._reference[id(packs)]

    @property
    def _has_adapters(self) -> bool:
        return hasattr(self.accelerator.unwrap_model(self.model), "disable_adapter")

    def _reference_file(self, packs: RatedPacks) -> Path:
        model = self._reference_model or self.model
        # Adapters are drawn anew by each run, and the base without them is what counts.
        base = self._reference_model is None and self._has_adapters
        weights = runs.hash_of(p for p in model.parameters() if not (base and p.requires_grad))
        precision = (self.args.bf16, self.args.fp16)
        facts = (packs.fingerprint, weights, precision, self.objective.name == "kto")
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        return Path(self.args.output_dir) / REFERENCE.format(key)

    def _read_reference(self, packs: RatedPacks) -> list[Tensor]:
        file = self._reference_file(packs)
        found = load_file(file) if file.is_file() else {}
        return [torch.from_numpy(found[str(i)]) for i in range(len(found))]

    def _computed_reference(self, packs: RatedPacks) -> list[Tensor]:
        rank, ranks = self.args.process_index, self.args.world_size
        own = {i: self._reference_of(packs[i]["batch"]) for i in range(rank, len(packs), ranks)}
        everyone = {i: values for part in self._gathered(own) for i, values in part.items()}
        values = [everyone[i] for i in range(len(packs))]
        if rank == 0:
            file = self._reference_file(packs)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")  # another rank sees the whole file or none
            save_file({str(i): v.numpy() for i, v in enumerate(values)}, part)
            part.replace(file)
        return values

    def _gathered(self, own: T) -> list[T]:
        """What each rank has, by rank."""
        if self.args.world_size == 1:
            return [own]
        everyone: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(everyone, own)
        return everyone

    @torch.no_grad()
    def _reference_of(self, batch: RatedBatch) -> Tensor:
        model = self._reference_model or self.model
        adapters = self._reference_model is not None or not self._has_adapters
        was_training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                found = [log_probs(model, t, adapters=adapters).log_p for t in batch.all_targets]
        finally:
            model.train(was_training)
        return torch.cat(found).float().cpu()

    # -- the loss ------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """The weight of all losses of the step, on all ranks, float64."""
        total = torch.tensor(
            sum(b["batch"].weight_sum for b in batch_samples), dtype=torch.float64, device=device
        )
        return self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    def _loss(self, model: nn.Module, inputs: dict[str, Any], denominator: float | None) -> Loss:
        batch = inputs["batch"]
        reference = self._reference_for(self.train_dataset, inputs["index"])
        policy = log_probs(model, batch.targets)
        losses, measures = self._losses(model, batch, policy, reference)
        self._measures += measures
        weight_sum = batch.weight_sum if denominator is None else denominator
        weight = torch.from_numpy(batch.weight).to(losses.device)
        log_p = policy.log_p.new_zeros(len(batch.targets.edges.rows))
        log_p[torch.from_numpy(batch.targets.edge).to(log_p.device)] = policy.log_p.detach()
        value = (losses * weight).sum() / weight_sum
        return Loss(value, weight_sum, log_p, batch.targets.edges, batch.targets.forest)

    def _reference_for(self, packs: RatedPacks, index: int) -> Tensor | None:
        found = self._refer(packs)
        return found[index] if found else None

    def _losses(
        self, model: nn.Module, batch: RatedBatch, policy: LogProbs, reference: Tensor | None
    ) -> tuple[Tensor, np.ndarray]:
        """(the losses of a batch, its measures)."""
        kl: Tensor | float = 0.0
        if reference is not None:
            reference = reference.to(policy.log_p.device)
            count = len(batch.targets)
            if batch.mismatched is not None:
                kl = self._kl(model, batch.mismatched, reference[count:])
            reference = reference[:count]
        losses = self.objective(batch, policy.log_p, reference, kl)
        log_p = policy.log_p.detach()
        if reference is None and self.objective.policy_gradient is not None:
            reference = batch.old_log_p(log_p)
        return losses, measures(self.objective, batch, losses.detach(), log_p, reference)

    @torch.no_grad()
    def _kl(self, model: nn.Module, mismatched: Targets, reference: Tensor) -> Tensor:
        return kto_kl(log_probs(model, mismatched).sums(), LogProbs(reference, mismatched).sums())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with what was measured since the last line."""
        if "loss" in logs:
            logs = {**logs, **rates(self._on_all_ranks(self._measures), without=("loss",))}
            self._measures = np.zeros_like(self._measures)
        super().log(logs, start_time)

    # -- evaluation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measured(self, data: Any) -> dict[str, float]:
        references = self._refer(data)
        sums = np.zeros_like(self._measures)
        was_training = self.model.training
        self.model.eval()
        try:
            for i in range(self.args.process_index, len(data), self.args.world_size):
                batch = data[i]["batch"]
                with self.accelerator.autocast():
                    policy = log_probs(self.model, batch.targets)
                    sums += self._losses(self.model, batch, policy, references[i] if references else None)[1]
        finally:
            self.model.train(was_training)
        return rates(self._on_all_ranks(sums))

    def _on_all_ranks(self, sums: np.ndarray) -> np.ndarray:
        if self.args.world_size == 1:
            return sums
        found: Tensor = self.accelerator.reduce(torch.from_numpy(sums).to(self.args.device), "sum")
        return found.cpu().numpy()


def measures(
    objective: Objective, batch: RatedBatch, losses: Tensor, log_p: Tensor, reference: Tensor | None
) -> np.ndarray:
    """(sum, count) of each of MEASURES over a batch, float64; weights count for the loss alone."""
    gain = batch.by_reply(log_p if reference is None else log_p - reference, objective.of_means)
    better, worse = batch.pairs.T
    margins = (gain[better] - gain[worse]).double().cpu().numpy()
    kl = np.zeros(0) if reference is None else kl_estimate(log_p, reference).double().cpu().numpy()
    good = batch.rewards[batch.reply_of_target] > 0
    values = log_p.double().cpu().numpy()
    weight = batch.weight.astype(np.float64)
    parts = [margins, margins > 0, kl, -values[good], -values[~good]]
    first = [float(weight @ losses.double().cpu().numpy()), weight.sum()]
    return np.array([first, *([p.sum(), len(p)] for p in parts)]) * bool(weight.any())


def rates(sums: np.ndarray, without: tuple[str, ...] = ()) -> dict[str, float]:
    """The means of MEASURES; what has no count is left out."""
    found = zip(MEASURES, sums.tolist(), strict=True)
    return {name: total / count for name, (total, count) in found if count and name not in without}
