"""What commands take: sections of options, each of which stands here and nowhere else.

`ygx train` has all of them in one `TrainConfig`, from a YAML file, flags, or both. The other commands take the
sections that they need.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from ..choices import Control, Denominator, Overflow, ScoreBorder, ScoreOverflow
from ..errors import ConfigError, refuse_unknown
from ..forest import MAX_TOKENS
from ..rows.raw import MAX_ROW_BYTES
from .migration import hint
from .options import (
    COUNT,
    PAIR,
    Bounds,
    check_options,
    checked,
    default_of,
    fields_by_name,
    fit,
    flags_of,
    key_of,
    meaning_of,
    option,
)

CORES = os.cpu_count() or 1


# -- sections ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnOptions:
    """What the columns of a file mean."""

    format: str | None = option(None, "the row format, where columns fit several")
    x: str | None = option(None, "the column of the input")
    y: str | None = option(None, "the column of the output")
    plain: bool = option(False, "x and y are text as the model reads it: no chat template", flags="--plain")
    split: str | None = option(None, "which of a dataset's splits")
    roles: str | None = option(None, "roles of messages that the template has beside the known ones: a,b")
    max_row_bytes: int = option(MAX_ROW_BYTES, "quarantine rows of more bytes", bounds=COUNT)


@dataclass(frozen=True)
class LimitedRowOptions(ColumnOptions):
    """Some rows of a file."""

    limit: int | None = option(None, "read at most so many rows", bounds=COUNT, default_text="all")


@dataclass(frozen=True)
class RowOptions(LimitedRowOptions):
    """Rows of a file, accepted or quarantined."""

    quarantine: str | None = option(None, "write rows that can't be used there, with reasons, as JSON Lines")


@dataclass(frozen=True)
class ReportOutputs:
    """Files that an audit writes."""

    html: str | None = option(None, "write the page there")
    sarif: str | None = option(None, "write SARIF 2.1.0 there, for code scanning")
    junit: str | None = option(None, "write JUnit's XML there: a test for each rule")


@dataclass(frozen=True)
class EncodedRowOptions(RowOptions):
    """Rows of a file that are encoded, in several processes where they are many."""

    processes: int = option(
        CORES, "processes that encode large files", bounds=COUNT, default_text="one per core"
    )


@dataclass(frozen=True)
class DataSection(EncodedRowOptions):
    """The rows of a run."""

    path: list[str] | None = option(
        None, "the rows to train on: files, patterns such as chats/*.parquet; may be repeated", flags="--data",
        required=True,
    )  # fmt: skip
    mix: dict[str, float] = option(
        {}, "name=weight of a file: 2 sees its rows twice in an epoch, 0.5 half of them", flags="--mix"
    )
    cache: str | None = option(
        None,
        "where encoded rows are kept for the next run",
        default_text="$YGIVENX_CACHE, or ~/.cache/ygivenx/encoded",
    )
    eval_path: list[str] | None = option(None, "held-out rows; may be repeated", flags="--eval-data")
    eval_split: str | None = option(None, "which of the held-out dataset's splits")
    eval_limit: int | None = option(
        None, "read at most so many held-out rows", bounds=COUNT, default_text="all"
    )


@dataclass(frozen=True)
class ModelOptions:
    """Where a model lies."""

    path: str | None = option(
        None, "a model's directory or name; `sample` is SmolLM2", flags="--model -m", required=True
    )
    gguf_file: str | None = option(None, "the GGUF file inside the model's directory")
    trust_remote_code: bool = option(
        False, "run Python code that comes with the model; never otherwise", flags="--trust-remote-code"
    )
    verbose: bool = option(False, "show what other libraries say", flags="--verbose")


@dataclass(frozen=True)
class Weights(ModelOptions):
    """A model that is computed with."""

    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the weights and products")


@dataclass(frozen=True)
class ModelSection(ModelOptions):
    """The model that is trained."""

    dtype: Literal["auto", "float32", "bf16", "fp16", "bfloat16", "float16"] = option(
        "auto",
        "auto: float32 weights, and products in bfloat16 where this machine has them; bf16, fp16: mixed precision "
        "with float32 weights; bfloat16: weights too, which loses small updates",
    )


@dataclass(frozen=True)
class EncoderSection:
    """How rows become tokens with weights: these, and any other option of `yx.Encoder` by name."""

    train: str = option("assistant", "what is trained: assistant, last, all, or a role")
    control: Control = option("refuse", "control tokens in a row's text")
    max_length: int | None = option(None, "tokens of a sequence", bounds=PAIR, default_text="no limit")
    overflow: Overflow = option("refuse", "what happens to a longer one")
    further: dict[str, Any] = option(
        {}, "name=value of a further option of Encoder, such as repair=append_end", flags="--encoder -e"
    )


@dataclass(frozen=True)
class LoraSection:
    """Adapters in the place of full training: the rank, and any other field of PEFT's `LoraConfig`."""

    further: dict[str, Any] = option(
        {}, "the rank of LoRA adapters, or name=value of a field of LoraConfig; may be repeated",
        flags="--lora", bare="r",
    )  # fmt: skip


@dataclass(frozen=True)
class ObjectiveSection:
    """What is descended on rated replies (docs/objectives.md) in the place of −log Pr(y|x), and its options."""

    further: dict[str, Any] = option(
        {}, "dpo, ipo, orpo, simpo, kto, reward_weighted, grpo, dapo, rloo or gspo, or name=value of one of its "
        "options, such as beta=0.1; may be repeated", flags="--objective", bare="name",
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingSection:
    """The steps of a run: these, and any other field of transformers' `TrainingArguments`."""

    max_tokens: int = option(MAX_TOKENS, "distinct tokens in one micro-batch", bounds=PAIR)
    denominator: Denominator = option("tokens", "what the sum of a step is divided by")
    num_train_epochs: float = option(1.0, "passes over the rows", flags="--epochs", bounds=Bounds(open=True))
    max_steps: int | None = option(None, "optimiser steps, whatever epochs says", bounds=COUNT)
    gradient_accumulation_steps: int = option(1, "micro-batches of one optimiser step", bounds=COUNT)
    learning_rate: float | None = option(
        None, "the highest learning rate", bounds=Bounds(), default_text="2e-5, with LoRA 2e-4"
    )
    lr_scheduler_type: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial",
        "inverse_sqrt",
    ] = option("cosine", "the learning rate over the run", flags="--lr-scheduler")  # fmt: skip
    warmup_steps: float = option(
        0, "steps with a rising learning rate; below 1: share of the run", bounds=Bounds()
    )
    weight_decay: float = option(0.0, "weight decay of the optimiser", bounds=Bounds())
    max_grad_norm: float = option(1.0, "the norm that gradients are clipped to; 0: never", bounds=Bounds())
    optim: str = option("adamw_torch_fused", "the optimiser, by transformers' names")
    gradient_checkpointing: bool = option(False, "compute activations twice to save memory")
    logging_steps: int = option(5, "steps between log lines", bounds=COUNT)
    report_to: str = option("none", "tensorboard, wandb, trackio, mlflow, ..., as in transformers")
    eval_steps: int | None = option(
        None, "evaluate every so many steps", bounds=COUNT, default_text="at the ends"
    )
    save_steps: int | None = option(
        None, "a checkpoint every so many steps", bounds=COUNT, default_text="when interrupted"
    )
    # Two: one that is whole while the next one is written.
    save_total_limit: int | None = option(2, "checkpoints that are kept", bounds=COUNT)
    load_best_model_at_end: bool = option(False, "end with the checkpoint of the lowest held-out loss")
    push_to_hub: bool = option(False, "upload the model, as in transformers")
    seed: int = option(
        0, "of the order of the rows and of dropout", bounds=Bounds(0, 2**32 - 1)
    )  # NumPy's limit
    further: dict[str, Any] = option(
        {},
        "name=value of a further field of TrainingArguments, such as adam_beta2=0.95",
        flags="--training -t",
    )


@dataclass(frozen=True)
class OutputSection:
    """Where a run is written."""

    dir: str | None = option(
        None, "checkpoints, the final model and the report", flags="--output-dir", required=True
    )
    resume: str | None = option(None, "auto: go on from the newest checkpoint; or a checkpoint's directory")


@dataclass(frozen=True)
class Scoring:
    """How rows are scored."""

    control: Control = option("refuse", "control tokens in a row's text")
    border: ScoreBorder = option("joint", "joint: one text, a straddling token is y; split: tokenised apart")
    bos: Literal["auto", "always", "never"] = option("auto", "auto: as the tokenizer does")
    overflow: ScoreOverflow = option(
        "refuse",
        "more than the model reads: refuse, left (cut x), roll or stride (windows with less or more overlap)",
    )
    max_length: int | None = option(None, "tokens read at once", bounds=COUNT, default_text="the model's")
    stride: int | None = option(
        None,
        "new tokens of each window of overflow=stride",
        bounds=COUNT,
        default_text="half of what is read at once",
    )
    window_bos: bool = option(False, "a BOS before every window", flags="--window-bos")
    unconditional: str | None = option(None, "a prompt in the place of x, for log Pr(y) and PMI")
    marginal: bool = option(
        True, "log Pr(x) too; without it scoring is cheaper", flags="--marginal/--no-marginal"
    )
    tokens: bool = option(False, "add value, rank and text of each token", flags="--tokens")
    words: bool = option(False, "add log p of each word of y, by white space", flags="--words")
    corrected_words: bool = option(
        False, "add log p of each word with its end, given that a word begins", flags="--corrected-words"
    )
    segments: bool = option(False, "add sums by segment and by field of the row", flags="--segments")
    entropy: bool = option(False, "add the entropy at each token", flags="--entropy")
    top_k: int = option(0, "add the most probable tokens at each token: how many", bounds=Bounds())


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    system: str | None = option(None, "a system message before the prompt")
    max_new_tokens: int = option(256, "tokens of a reply", bounds=COUNT)
    temperature: float = option(0.0, "0: always the most probable token", bounds=Bounds(most=100))
    top_p: float = option(
        1.0, "sample from the most probable tokens with this share", bounds=Bounds(most=1, open=True)
    )
    seed: int = option(0, "of the sampling", bounds=Bounds(0, 2**32 - 1))


@dataclass(frozen=True)
class TrainConfig:
    """One run of `ygx train`."""

    data: DataSection = field(default_factory=DataSection)
    encoder: EncoderSection = field(default_factory=EncoderSection)
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    output: OutputSection = field(default_factory=OutputSection)

    @classmethod
    def of(cls, path: Path | None, flags: Mapping[str, Any]) -> TrainConfig:
        """The keys of a YAML file, overridden by flags that are not None; both may be flat or in sections."""
        read = {} if path is None else _read(path)
        placed = _Placed(path)
        placed.add(read, str(path))
        placed.add({k: v for k, v in flags.items() if v is not None}, "flags")
        return placed.config()


def chosen(config: TrainConfig) -> dict[str, Any]:
    """The options that differ from their defaults, by section and key."""
    return {
        f"{section}.{f.name}": value
        for section in SECTIONS
        for f in fields(getattr(config, section))
        if (value := getattr(getattr(config, section), f.name)) != default_of(f)
    }


# -- from keys to sections ---------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in fields(TrainConfig)}
# Every option by its key in a flat file, which is that of its flag: the section and the field.
_FLAT = {key_of(f): (name, f.name) for name, section in SECTIONS.items() for f in fields(section)}
# Sections of which one value may stand alone, under this name.
_BARE = {
    name: f.metadata["bare"]
    for name, section in SECTIONS.items()
    for f in fields(section)
    if f.metadata["bare"]
}
# Fields of TrainingArguments that are said otherwise here, or that forests have no place for.
_ELSEWHERE = {
    "output_dir": "--output-dir",
    "resume_from_checkpoint": "--resume",
    "bf16": "--dtype bf16",
    "fp16": "--dtype fp16",
    "activation_checkpointing": "--gradient-checkpointing",
    "per_device_train_batch_size": "--max-tokens: a pack is one micro-batch",
    "per_device_eval_batch_size": "--max-tokens: a pack is one micro-batch",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "--data and --eval-data"),
    **dict.fromkeys(
        ("remove_unused_columns", "label_names", "length_column_name"), "nothing: rows are encoded"
    ),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics"), "nothing: evaluation makes no logits"),
}


class _Placed:
    """Values by section and field, and where each was said."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        self.further: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        self.where: dict[tuple[str, str], str] = {}

    def add(self, given: Mapping[str, Any], where: str) -> None:
        """Take in keys of a file or flags; later ones override earlier ones."""
        for key, value in given.items():
            if key in SECTIONS and isinstance(value, Mapping):
                for name, inner in value.items():
                    self._put(key, str(name), inner, where)
            elif key in _BARE:  # such as the rank of lora alone
                self._put(key, _BARE[key], value, where)
            elif key in _FLAT:
                self._put(*_FLAT[key], value, where)
            elif isinstance(value, Mapping):
                _refuse_key(key, SECTIONS, where, "section")
            else:
                _refuse_key(key, _FLAT, where)

    def _put(self, section: str, key: str, value: Any, where: str) -> None:
        """One key of a section; what isn't a field of ours may be a name of the class that the section stands for."""
        # `model` is a flat key of the model's path, and `path` a field of two sections: a flat key counts in its own.
        at, name = _FLAT.get(key, ("", ""))
        own = [f.name for f in fields(SECTIONS[section])]
        name = name if at == section else key
        if name == "further" and "further" in own and isinstance(value, Mapping):
            for inner, v in value.items():
                self._put(section, str(inner), v, where)
        elif name in own:
            self.values[section][name] = value
        elif "further" in own:
            self.further[section][name] = value
        else:
            _refuse_key(key, own, f"{where}, {section}")
        self.where[section, name] = where

    def config(self) -> TrainConfig:
        """The sections, checked. Raises ConfigError for what couldn't run, before anything is loaded."""
        config = TrainConfig(**{name: self._section(name) for name in SECTIONS})
        missing = [
            (f"{name}.{f.name}", flags_of(f)[0])
            for name, s in SECTIONS.items()
            for f in fields(s)
            if f.metadata["required"] and not self.values[name].get(f.name)
        ]
        if missing:
            keys, flags = zip(*missing, strict=True)
            fix, named = " ".join(f"{f} ..." for f in flags), flags
            if self.file is not None:
                fix, named = f"set them there (model.path: path under model), or {fix}", keys
            raise ConfigError(f"missing: {', '.join(named)}", where=str(self.file or ""), fix=fix)
        self._check(config)
        return config

    def _section(self, name: str) -> Any:
        section, values = SECTIONS[name], self.values[name]
        hints, options = get_type_hints(section), {}
        for f in fields(section):
            if f.name in values:
                where = self.where[name, f.name]
                options[f.name] = checked(key_of(f), values[f.name], f, hints[f.name], where)
        if self.further[name]:
            options["further"] = self._checked_further(name, self.further[name])
        return section(**options)

    def _checked_further(self, section: str, values: dict[str, Any]) -> dict[str, Any]:
        where = self.where[section, next(iter(values))]
        if section == "encoder":
            _refuse_foreign(values, where)
            check_options(values, where)
            return values
        if section == "objective":
            return _checked_objective(values, where)
        hints = _lora_hints(values, where) if section == "lora" else _training_hints(values, where)
        given = {k: v for k, v in values.items() if v is not None}
        return {k: fit(f"{section}.{k}", v, hints[k], self.where[section, k]) for k, v in given.items()}

    # An option without effect is a mistake that nobody would see in the run.
    def _check(self, config: TrainConfig) -> None:
        if config.data.eval_path is None:
            for section, name in (("data", "eval_split"), ("data", "eval_limit"), ("training", "eval_steps")):
                if self.values[section].get(name) is not None:
                    where = self.where[section, name]
                    raise ConfigError(
                        f"{name} without eval_data", where=where, fix="--eval-data names the rows"
                    )
        if config.training.load_best_model_at_end and config.data.eval_path is None:
            raise ConfigError("load_best_model_at_end without eval_data", fix="--eval-data names the rows")
        for section, name in (
            (("training", "denominator"), ("data", "mix")) if config.objective.further else ()
        ):
            if self.values[section].get(name):
                why = "a step's loss is the mean over its rows, by their weights"
                where = self.where[section, name]
                raise ConfigError(f"{name} beside an objective", where=where, why=why, fix="leave it out")
        if config.lora.further.get("r", 1) < 1:
            where = self.where["lora", "r"]
            raise ConfigError(f"lora.r is {config.lora.further['r']}", where=where, fix="give a rank ≥ 1")


def _checked_objective(values: dict[str, Any], where: str) -> dict[str, Any]:
    from ..training.rated import Objective

    name, options = values.get("name"), {k: v for k, v in values.items() if k != "name"}
    if name is None:
        raise ConfigError(
            f"{', '.join(options)} of which objective?", where=where, fix="--objective dpo, or name: dpo"
        )
    if not isinstance(name, str):
        raise ConfigError(f"{name!r} is no objective's name", where=where, fix="a text, such as dpo")
    try:
        Objective(name, options)
    except ConfigError as error:
        error.where = where
        raise
    return values


def _refuse_key(key: str, known: Iterable[str], where: str, what: str = "key") -> None:
    """Raise ConfigError for a key that isn't known; one that another tool has by what it is called here."""
    if key not in (known := list(known)):
        _refuse_foreign([key], where)
    refuse_unknown(what, [key], known, where)


def _refuse_foreign(names: Iterable[str], where: str) -> None:
    for name in names:
        if ours := hint(name):
            raise ConfigError(f"{name!r} is another tool's name", where=where, fix=f"here: {ours}")


def _lora_hints(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        from peft import LoraConfig
    except ImportError:  # said with its extra when the adapters are made
        return dict.fromkeys(values, Any)
    return fields_by_name(values, LoraConfig, "field of LoraConfig", where)


def _training_hints(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    from transformers import TrainingArguments

    for name in values:
        if name in _ELSEWHERE:
            raise ConfigError(f"{name} isn't said here", where=where, fix=f"use {_ELSEWHERE[name]}")
    _refuse_foreign(values.keys() - TrainingArguments.__dataclass_fields__.keys(), where)
    return fields_by_name(values, TrainingArguments, "field of TrainingArguments", where)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values, tree = yaml.safe_load(text), yaml.compose(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("unreadable config", where=str(path), why=str(error)) from error
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ConfigError("a config is a mapping of keys to values", where=str(path))
    for mapping in _mappings(tree):
        for name, times in Counter(key.value for key, _ in mapping.value).items():
            if times > 1:  # YAML would take the last one
                raise ConfigError(
                    f"{name} stands there {times} times", where=str(path), fix="leave one of them"
                )
    return {k: {} if v is None and k in SECTIONS else v for k, v in values.items()}


def _mappings(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)


# -- a commented file --------------------------------------------------------------------------------------


def template() -> str:
    """Every option of a run as YAML, commented: what isn't uncommented has its default."""
    lines = [
        "# A run of `ygx train`. What is commented out has the value that stands there, or is called an example."
    ]
    for name, section in SECTIONS.items():
        hints = get_type_hints(section)
        lines += ["", f"# {section.__doc__}", f"{name}:"]
        for f in fields(section):
            lines += _entry(name, f, hints[f.name])
    return "\n".join(lines) + "\n"


def _entry(section: str, f: Any, hint: Any) -> list[str]:
    if f.name == "further":
        example = {
            "lora": "r: 16",
            "objective": "name: dpo",
            "encoder": "repair: append_end",
            "training": "adam_beta2: 0.95",
        }[section]
        return ["  # further ones, for example:", f"  # {example}"]
    value = yaml.safe_dump(default_of(f)).removesuffix("...\n").strip()
    mark = "" if f.metadata["required"] else "# "
    return [f"  # {meaning_of(f, hint)}{default_text(f, ' [', ']')}", f"  {mark}{f.name}: {value}"]


def default_text(f: Any, before: str = "", after: str = "") -> str:
    """What stands for the default of an option that has none in itself, between two texts; "" for others."""
    text = "required" if f.metadata["required"] else f.metadata["default_text"]
    return f"{before}{text}{after}" if text else ""
