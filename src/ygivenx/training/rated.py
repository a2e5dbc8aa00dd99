"""Rated replies as micro-batches: packs of whole rows, the objective of a pack, and what is measured of it.

An objective is a function of log Pr(reply | prompt), summed or averaged over a reply's tokens by their weights, under
the model and, for most, under a reference. A row counts once: its weight is shared by its pairs, or its replies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import objectives
from ..errors import ConfigError, nearest
from ..forest import Forest, Ints
from ..sequence import Example, RatedExample, Sequence
from ..show import plural
from ..targets import LogProbs, Targets

Name = Literal["dpo", "ipo", "orpo", "simpo", "kto", "reward_weighted", "grpo", "dapo", "rloo", "gspo"]
_OF_PAIRS = ("dpo", "ipo", "orpo", "simpo")
_OF_MEANS = ("ipo", "orpo", "simpo")  # of log p by token; ipo as its authors' results and TRL have it
_REFERENCE = ("dpo", "ipo", "kto")


class PolicyGradient(NamedTuple):
    """How an objective of sampled replies uses `objectives.clipped_terms`.

    advantages: the `kind` of `group_advantages`. mean: whether a reply's terms are averaged, or added up. by_tokens:
    whether a reply counts by its number of tokens, or once.
    """

    advantages: Literal["grpo", "rloo"] = "grpo"
    level: objectives.Level = "token"
    mean: bool = True
    by_tokens: bool = False
    clip: tuple[float, float] = (0.2, 0.2)


POLICY_GRADIENTS = {
    "grpo": PolicyGradient(),
    "dapo": PolicyGradient(by_tokens=True, clip=(0.2, 0.28)),
    "rloo": PolicyGradient("rloo", mean=False),
    "gspo": PolicyGradient(level="sequence", clip=(3e-4, 4e-4)),
}
_POLICY_OPTIONS = ["clip_low", "clip_high", "kl"]


@dataclass(frozen=True)
class Objective:
    """A function of `ygivenx.objectives` by name, with its options, such as beta.

    Raises ConfigError for a name or an option that there isn't.
    """

    name: str
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = get_args(Name)
        if self.name not in names:
            what = f"unknown objective {self.name!r}{nearest(self.name, names)}"
            raise ConfigError(what, fix=f"one of {', '.join(names)}")
        known = _POLICY_OPTIONS
        if self.policy_gradient is None:
            parameters = signature(self.function).parameters.values()
            known = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
        for option, value in self.options.items():
            if option not in known:
                fix = f"it has {', '.join(known)}" if known else "it has none"
                raise ConfigError(f"{self.name} has no option {option!r}{nearest(option, known)}", fix=fix)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{option} of {self.name} is {value!r}", fix="give a number")

    @property
    def function(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(objectives, self.name)
        return function

    @property
    def of_pairs(self) -> bool:
        """Whether it compares two replies to one prompt."""
        return self.name in _OF_PAIRS

    @property
    def policy_gradient(self) -> PolicyGradient | None:
        """How it uses advantages, of an objective that does."""
        return POLICY_GRADIENTS.get(self.name)

    @property
    def has_reference(self) -> bool:
        return self.name in _REFERENCE or self.options.get("kl", 0) > 0

    @property
    def of_means(self) -> bool:
        return self.name in _OF_MEANS

    def __call__(
        self, batch: RatedBatch, log_p: Tensor, reference: Tensor | None, kl: Tensor | float
    ) -> Tensor:
        """One loss per pair or reply of the batch, in nats; log_p, reference: float32 [M], by target."""
        if self.policy_gradient is not None:
            return self._policy_gradient(self.policy_gradient, batch, log_p, reference)
        policy = batch.by_reply(log_p, self.of_means)
        values = [policy] if reference is None else [policy, batch.by_reply(reference, self.of_means)]
        if self.of_pairs:
            values = [v[torch.from_numpy(side).to(v.device)] for v in values for side in batch.pairs.T]
            return self.function(*values, **self.options)
        rewards = torch.from_numpy(batch.rewards).to(policy.device)
        if self.name == "kto":
            return self.function(*values, rewards > 0, kl, **self.options)
        return self.function(*values, rewards, **self.options)

    def _policy_gradient(
        self, form: PolicyGradient, batch: RatedBatch, log_p: Tensor, reference: Tensor | None
    ) -> Tensor:
        options = self.options
        clip = (options.get("clip_low", form.clip[0]), options.get("clip_high", form.clip[1]))
        terms = objectives.clipped_terms(
            LogProbs(log_p, batch.targets), torch.from_numpy(batch.advantages).to(log_p.device),
            batch.old_log_p(log_p.detach()), clip=clip, level=form.level, reference_log_p=reference,
            kl_weight=options.get("kl", 0.0),
        )  # fmt: skip
        return batch.by_reply(terms, form.mean)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v:g}" for k, v in self.options.items())])


@dataclass(frozen=True, eq=False)
class RatedBatch:
    """R replies of some rows, as one forest.

    reply: int64 [S], the reply that each sequence is part of. rewards: float32 [R]. pairs: int64 [P, 2], a better and
    a worse reply of one row each. weight: float32 [P] or [R], of each loss. mismatched: the prompt of each reply with
    another row's reply, for KTO's estimate of the KL divergence. logged: float32 [M], log Pr of each target when it was
    sampled, NaN where none was logged. advantages: float32 [M].
    """

    targets: Targets
    reply: Ints
    rewards: np.ndarray
    pairs: Ints
    weight: np.ndarray
    logged: np.ndarray
    advantages: np.ndarray
    mismatched: Targets | None = None

    @classmethod
    def of(
        cls, rows: list[RatedExample], objective: Objective, others: list[Sequence] | None = None
    ) -> RatedBatch:
        """others: for each reply one of another row, if the objective asks for mismatched ones."""
        replies = [reply for row in rows for reply in row.replies]
        weights = [weight for row in rows for weight in _loss_weights(row, objective)]
        first = np.cumsum([0, *(len(row.replies) for row in rows)])
        pairs = [
            (a + start, b + start) for row, start in zip(rows, first, strict=False) for a, b in row.pairs
        ]
        mismatched = None
        if others is not None:
            own = (s for reply in replies for s in reply.sequences[-1:])
            mismatched = Targets.of(_mismatched(a, b) for a, b in zip(own, others, strict=True))
        sequences = [s for reply in replies for s in reply]
        targets = Targets.of(sequences)
        reply = np.repeat(np.arange(len(replies)), [len(r.sequences) for r in replies])
        return cls(
            targets,
            reply,
            np.array([reward for row in rows for reward in row.rewards], np.float32),
            np.array(pairs, np.int64).reshape(-1, 2),
            np.array(weights, np.float32),
            _of_targets(targets, [s.logged.log_probs for s in sequences], np.nan),
            _of_targets(targets, [s.logged.advantages for s in sequences], 0.0),
            mismatched,
        )

    def old_log_p(self, log_p: Tensor) -> Tensor:
        """What was logged of each target; where nothing was, log_p: a ratio of 1."""
        logged = torch.from_numpy(self.logged).to(log_p.device)
        return torch.where(logged.isnan(), log_p, logged)

    @property
    def all_targets(self) -> list[Targets]:
        """Its targets, and mismatched ones where there are some."""
        return [self.targets, *([] if self.mismatched is None else [self.mismatched])]

    @property
    def weight_sum(self) -> float:
        """What a batch adds to the denominator of its step."""
        return float(self.weight.sum(dtype=np.float64))

    @cached_property
    def reply_of_target(self) -> Ints:
        """int64 [M], the reply that each target is part of."""
        return self.reply[self.targets.sequence]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Σ of the weights of each reply's tokens, float64 [R]."""
        return np.bincount(self.reply_of_target, self.targets.weight, len(self.rewards))

    def by_reply(self, values: Tensor, mean: bool = False) -> Tensor:
        """Σ w·value over the targets of each reply, or its mean by Σ w: float32 [R] of values [M]."""
        place, weight, lengths = (
            torch.from_numpy(a).to(values.device)
            for a in (self.reply_of_target, self.targets.weight, self.lengths)
        )
        total = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
        total = total.index_add(0, place, (values * weight).double())
        return (total / lengths if mean else total).to(values.dtype)


def _of_targets(targets: Targets, by_sequence: list[np.ndarray | None], missing: float) -> np.ndarray:
    """float32 [M] of arrays [T] by sequence."""
    out = np.full(len(targets), missing, np.float32)
    stops = np.cumsum(targets.lengths)
    for a, b, values in zip(stops - targets.lengths, stops, by_sequence, strict=True):
        if values is not None:
            out[a:b] = values[targets.position[a:b]]
    return out


def _loss_weights(row: RatedExample, objective: Objective) -> list[float]:
    """The weight of each of a row's losses: shared by its pairs or replies, or by tokens."""
    if objective.policy_gradient and objective.policy_gradient.by_tokens:
        return [row.weight * float(sum(s.weights[1:].sum() for s in reply)) for reply in row.replies]
    count = len(row.pairs) if objective.of_pairs else len(row.replies)
    return [row.weight / max(1, count)] * count


def _reply(sequence: Sequence) -> slice:
    """From the first weighted token on."""
    return slice(int(np.argmax(sequence.weights > 0)), len(sequence))


def _mismatched(sequence: Sequence, other: Sequence) -> Sequence:
    """The prompt of one sequence with the reply of another."""
    start, reply = _reply(sequence).start, _reply(other)
    return Sequence(
        np.concatenate((sequence.ids[:start], other.ids[reply])),
        np.concatenate((np.zeros(start, np.float32), other.weights[reply])),
    )


class RatedPacks(Dataset[dict[str, Any]]):
    """Rows of rated replies in forests of about `max_tokens` distinct tokens, each row whole in one of them.

    Rows with one prompt stand together. Item i is {"batch", "forest", "names", "index"}, made when it is asked for.
    skipped: rows of which the objective learns nothing, such as a single reply where it compares two.
    """

    def __init__(self, rows: Iterable[Any], *, objective: Objective, max_tokens: int, seed: int) -> None:
        given = list(rows)
        for i, row in enumerate(given):
            if not isinstance(row, RatedExample):
                raise ConfigError(
                    f"item {i} of the data set is a {type(row).__name__}, not a RatedExample",
                    fix="examples, rejected = yx.PreferenceEncoder(yx.Encoder(tokenizer)).batch(rows)",
                )
        count = len(given)
        if objective.policy_gradient is not None:
            given = _with_advantages(given, objective.policy_gradient)
        self.rows = [row for row in given if _loss_weights(row, objective)]
        self.objective, self.skipped, self.fillers = objective, count - len(self.rows), 0
        self.packs = _packed(self.rows, max_tokens, seed)

    def fill(self, ranks: int) -> None:
        """Every rank needs the same number of micro-batches: the first pack comes again, without weight."""
        self.fillers = -len(self.packs) % ranks

    def __len__(self) -> int:
        return len(self.packs) + self.fillers

    def __getitem__(self, index: int) -> dict[str, Any]:
        is_filler = index >= len(self.packs)
        pack = self.packs[0 if is_filler else index]
        others = [o for i in pack for o in self._others(i)] if self.objective.name == "kto" else None
        batch = RatedBatch.of([self.rows[i] for i in pack], self.objective, others)
        if is_filler:
            batch = replace(batch, weight=np.zeros_like(batch.weight))
        names = rated_sequences(self.rows[i] for i in pack)[1]
        return {"batch": batch, "forest": batch.targets.forest, "names": names, "index": index}

    def _others(self, i: int) -> list[Sequence]:
        """For each reply of row i one of the row after it, in turn."""
        other = self.rows[(i + 1) % len(self.rows)].replies
        return [other[k % len(other)].sequences[-1] for k in range(len(self.rows[i].replies))]

    def sequence(self, member: int) -> Sequence:
        """Raises ConfigError: an audit compares weights of tokens, and here they change with the model."""
        what = "an audit can't look at a trainer of rated replies"
        raise ConfigError(what, fix="audit the rows, or a supervised trainer with the same encoder")

    @property
    def fingerprint(self) -> str:
        """A hash over every token, weight, reward and place: two equal ones train the same."""
        digest = hashlib.sha256(str(self.packs).encode())
        for i in (i for pack in (*self.packs, [0] * self.fillers) for i in pack):
            row = self.rows[i]
            for values in (
                np.array([row.weight, *row.rewards]),
                *(v for s in row for v in (s.ids, s.weights, *s.logged[:2]) if v is not None),
            ):
                digest.update(values.tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        replies = sum(len(row.replies) for row in self.rows)
        notes, lacking = "", "a pair"
        if self.objective.policy_gradient is not None:
            lacking = "advantages or a second reply"
            unlogged = sum(s.logged.log_probs is None for row in self.rows for s in row)
            if unlogged:
                notes = (
                    f"; {plural(unlogged, 'sequence')} without logged log-probabilities: the ratio is 1 there"
                )
        if self.skipped:
            notes = f"; {plural(self.skipped, 'row')} without {lacking} left out{notes}"
        return f"{plural(len(self.rows), 'row')} of {replies:,} rated replies in {plural(len(self), 'pack')}{notes}"


def rated_sequences(rows: Iterable[RatedExample]) -> tuple[list[Sequence], list[str]]:
    """All sequences of all replies, with a name for each ("row 3, chosen")."""
    replies = [(row.index, *named) for row in rows for named in zip(row.names, row.replies, strict=True)]
    return (
        [s for _, _, reply in replies for s in reply],
        [f"row {index}, {name}" for index, name, reply in replies for _ in reply],
    )


def _with_advantages(rows: list[RatedExample], form: PolicyGradient) -> list[RatedExample]:
    """The rows with an advantage for every token: the logged one, or that of the reply among all replies to its prompt.

    Rows of a prompt with a single reply have none, and are left out.
    """
    rewards: dict[bytes, list[float]] = {}
    prompts = [_prompt(row).tobytes() for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        rewards.setdefault(prompt, []).extend(
            r for r, reply in zip(row.rewards, row.replies, strict=True) if not _has_advantages(reply)
        )
    groups = {
        prompt: iter(objectives.group_advantages(torch.tensor(r), len(r), kind=form.advantages).tolist())
        for prompt, r in rewards.items()
        if len(r) > 1
    }
    return [
        replace(
            row,
            replies=tuple(r if _has_advantages(r) else _of_one(r, next(groups[prompt])) for r in row.replies),
        )
        for row, prompt in zip(rows, prompts, strict=True)
        if prompt in groups or all(map(_has_advantages, row.replies))
    ]


def _has_advantages(reply: Example) -> bool:
    return all(s.logged.advantages is not None for s in reply)


def _of_one(reply: Example, advantage: float) -> Example:
    """The reply with one advantage for all of its tokens."""
    full = (s.logged._replace(advantages=np.full(len(s), advantage, np.float32)) for s in reply)
    return replace(reply, sequences=tuple(replace(s, logged=v) for s, v in zip(reply, full, strict=True)))


def _packed(rows: list[RatedExample], max_tokens: int, seed: int) -> list[list[int]]:
    """Indices of the rows of each pack: those of one prompt one after the other, in an order by seed."""
    by_prompt: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(_prompt(row).tobytes(), []).append(i)
    groups = list(by_prompt.values())
    packs: list[list[int]] = []
    room = 0
    for g in np.random.default_rng((seed, 0)).permutation(len(groups)):
        shared = 0
        for i in groups[g]:
            size = len(Forest.of([rows[i]]))
            if size - shared > room:
                packs.append([])
                room, shared = max_tokens, 0
            packs[-1].append(i)
            room, shared = room - (size - shared), len(_prompt(rows[i]))
    return packs


def _prompt(row: RatedExample) -> Ints:
    sequence = row.replies[0].sequences[0]
    return sequence.ids[: _reply(sequence).start]
