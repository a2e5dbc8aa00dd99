"""What is chosen for all rows: options; and policies, which say how much each part weighs and are multiplied.

A policy takes a `Part` and gives a number ≥ 0. By name, separated by commas: `assistant` (every reply), `last`
(the last reply), `all` (every token), `roles=user+assistant`, `prompt=0.1` (replies 1, the rest 0.1), and
the factors `reasoning=0` (also of a thought in the content, `<think>...</think>`), `tool_calls=0`, `end_of_turn=0.5`. A
message's own `weight` always counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from ..errors import ConfigError, nearest
from .tokenize import Tokens


@dataclass(frozen=True, slots=True)
class Part:
    """A run of tokens: its segment's kind, whether the model has to produce it, and where it comes from.

    role: of its message, None for the template's own text; last: part of the last reply; weight: the
    message's own.
    """

    kind: str
    output: bool
    message: int | None = None
    role: str | None = None
    last: bool = False
    weight: float = 1.0


Policy = Callable[[Part], float]


def assistant(part: Part) -> float:
    """Every reply, whole: reasoning, answer, tool calls and the end of the turn."""
    return float(part.output)


def last(part: Part) -> float:
    """The last reply alone."""
    return float(part.output and part.last)


def everything(part: Part) -> float:
    """Every token, as plain language modelling."""
    return 1.0


def roles(*names: str) -> Policy:
    """What messages of these roles say; of replies also the end of the turn."""
    # Rows with the older name are read as tool's.
    chosen = {*names, *(["tool"] if "function" in names else [])}
    return lambda part: float(part.role in chosen and (part.output or part.role != "assistant"))


def prompt(weight: float) -> Policy:
    """Replies count 1, everything else `weight`."""
    return lambda part: 1.0 if part.output else weight


def factor(kind: str, weight: float) -> Policy:
    """A factor for one kind of output segment."""
    return lambda part: weight if part.output and part.kind == kind else 1.0


BASES: dict[str, Policy] = {"assistant": assistant, "last": last, "all": everything}
FACTORS = {"reasoning": "reasoning", "tool_calls": "tool_call", "end_of_turn": "end_of_turn"}


def policy_of(train: str | Policy | Iterable[str | Policy]) -> Policy:
    """One policy from names, functions or several of them; raises ConfigError for an unknown name."""
    if callable(train):
        return train
    given = train.split(",") if isinstance(train, str) else list(train)
    parts = [p if callable(p) else p.strip() for p in given]
    named = [p for p in parts if isinstance(p, str)]
    if len(named) == len(parts) and all(_key(p) in FACTORS for p in named):
        parts = ["assistant", *parts]
    return product([p if callable(p) else _named(p) for p in parts])


def product(policies: list[Policy]) -> Policy:
    if len(policies) == 1:
        return policies[0]
    return lambda part: math.prod(p(part) for p in policies)


def weight_of(policy: Policy, part: Part) -> float:
    """The policy's weight for a part times the message's own; raises ConfigError unless finite and ≥ 0."""
    weight = float(policy(part)) * part.weight
    if not 0 <= weight < math.inf:
        raise ConfigError(f"a policy gives {weight} for {part}", fix="weights are finite numbers ≥ 0")
    return weight


def _key(name: str) -> str:
    return name.partition("=")[0]


def _named(name: str) -> Policy:
    key, _, value = name.partition("=")
    if name in BASES:
        return BASES[name]
    if key == "roles" and value:
        return roles(*value.split("+"))
    if key == "prompt":
        return prompt(_number(name, value, 1.0))
    if key in FACTORS:
        return factor(FACTORS[key], _number(name, value, math.inf))
    known = [*BASES, "roles", "prompt", *FACTORS]
    raise ConfigError(
        f"unknown policy {name!r}{nearest(key, known)}",
        where="train",
        fix="known: "
        + ", ".join([*BASES, "roles=user+assistant", "prompt=0.1", *(f"{f}=0" for f in FACTORS)]),
    )


def _number(name: str, value: str, most: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= most or number == math.inf:
        limits = "a number from 0 to 1" if most == 1 else "a number ≥ 0"
        raise ConfigError(f"{name!r} needs {limits}", where="train", fix=f"such as {_key(name)}=0.1")
    return number


# === options =============================================================================================


@dataclass(frozen=True)
class Options:
    """The encoder's options; see `Encoder`."""

    tokens: Tokens
    policy: Policy
    control: str = "refuse"
    border: str = "auto"
    context: str = "inference"
    dropped: str = "refuse"
    repairs: frozenset[str] = frozenset()
    max_length: int | None = None
    overflow: str = "refuse"
    thoughts: str = "as_written"
    bos: bool | str = "auto"
    eos: bool | str = "auto"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)

    @cached_property
    def weigh(self) -> Callable[..., float]:
        """The weight of a `Part` by its fields; of parts that are alike a policy is asked once."""
        return lru_cache(4096)(lambda *part: weight_of(self.policy, Part(*part)))
