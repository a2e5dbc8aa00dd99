"""What `ygx train` can be told, by flags or a YAML file; an unknown key is an error with the nearest name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, nearest
from .inputs import check_options


@dataclass(frozen=True)
class TrainConfig:
    """One run. Paths are as given; None leaves a choice to the default of the part that it goes to."""

    data: str
    model: str
    output_dir: str
    gguf_file: str | None = None
    dtype: str = "float32"
    format: str | None = None
    x: str | None = None
    y: str | None = None
    plain: bool = False
    split: str | None = None
    limit: int | None = None
    eval_data: str | None = None
    eval_split: str | None = None
    eval_limit: int | None = None
    eval_steps: int | None = None
    train: str = "assistant"
    control: str = "refuse"
    max_length: int | None = None
    overflow: str = "refuse"
    encoder: dict[str, Any] | None = None
    max_tokens: int = 1024
    denominator: str = "tokens"
    epochs: float = 1.0
    max_steps: int = -1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-5
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    lora: int | None = None
    logging_steps: int = 5
    save_steps: int | None = None
    save_total_limit: int | None = 2
    resume: str | None = None
    seed: int = 0

    @classmethod
    def of(cls, path: Path | None, flags: dict[str, Any]) -> TrainConfig:
        """The keys of a YAML file, overridden by the flags that are not None."""
        told = {} if path is None else _read(path)
        given = {k: v for k, v in flags.items() if v is not None}
        merged = {**told, **given}
        where = dict.fromkeys(told, str(path)) | dict.fromkeys(given, "flags")
        known = {f.name: f for f in fields(cls)}
        for key in merged:
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r}{nearest(key, known)}",
                    where=where[key],
                    fix=f"known keys: {', '.join(known)}",
                )
        missing = [n for n in ("data", "model", "output_dir") if merged.get(n) is None]
        if missing:
            raise ConfigError(
                f"missing: {', '.join(missing)}",
                fix=" ".join(f"--{m.replace('_', '-')} ..." for m in missing),
            )
        config = cls(**{k: _typed(k, v, str(known[k].type), where[k]) for k, v in merged.items()})
        _check(config, where)
        return config


Fits = tuple[Callable[[Any], bool], str]  # whether a value fits, and what would


def _at_least(least: int, most: float = math.inf) -> Fits:
    wanted = f"a number ≥ {least}" if most == math.inf else f"a number from {least} to {most}"
    return lambda v: least <= v <= most and v != math.inf, wanted


def _one_of(*names: str) -> Fits:
    return lambda v: v in names, f"one of {', '.join(names)}"


# What runs on a schedule that needs no settings of its own.
_SCHEDULES = (
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt",
)  # fmt: skip
_COUNTS = (
    "limit", "eval_limit", "eval_steps", "max_steps", "gradient_accumulation_steps", "lora", "logging_steps",
    "save_steps", "save_total_limit",
)  # fmt: skip
_FITS: dict[str, Fits] = {
    **dict.fromkeys(_COUNTS, _at_least(1)),
    **dict.fromkeys(("max_length", "max_tokens"), _at_least(2)),
    **dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm", "learning_rate"), _at_least(0)),
    "epochs": (lambda v: 0 < v < math.inf, "a number > 0"),
    "seed": _at_least(0, 2**32 - 1),  # NumPy's limit
    "lr_scheduler": _one_of(*_SCHEDULES),
    "denominator": _one_of("tokens", "sequence"),
    "dtype": _one_of("float32", "bfloat16", "float16"),
}


def _check(config: TrainConfig, where: Mapping[str, str]) -> None:
    """Raise ConfigError for what couldn't run: before a model is loaded and rows are encoded for nothing.

    where: which file, or "flags", each key comes from.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in _FITS or value == f.default:
            continue
        fits, wanted = _FITS[f.name]
        if not fits(value):
            raise ConfigError(f"{f.name} is {value!r}", where=where[f.name], fix=f"give {wanted}")
    if config.eval_data is None:
        for name in ("eval_split", "eval_limit", "eval_steps"):
            if getattr(config, name) is not None:
                what = f"{name} without eval_data"
                raise ConfigError(what, where=where[name], fix="--eval-data names the rows")
    check_options(config.encoder or {}, where.get("encoder", ""))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        told, tree = yaml.safe_load(text), yaml.compose(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("unreadable config", where=str(path), why=str(error)) from error
    if not isinstance(told, dict) or not all(isinstance(k, str) for k in told):
        raise ConfigError("a config is a mapping of keys to values", where=str(path))
    for name, times in Counter(key.value for key, _ in getattr(tree, "value", ())).items():
        if times > 1:  # YAML would take the last one
            raise ConfigError(f"{name} stands there {times} times", where=str(path), fix="leave one of them")
    return told


def _typed(key: str, value: Any, declared: str, where: str) -> Any:
    """`value` as the declared type; YAML reads 2e-5 as text, and a bool is not a number."""
    if value is None and "None" in declared:
        return None
    kind = declared.split(" |")[0]
    kinds: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool, "dict[str, Any]": dict}
    wanted = kinds[kind]
    try:
        if wanted is float and not isinstance(value, bool):
            return float(value)
        if isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
            return value
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{key} must be {kind}, got {value!r}", where=where)
