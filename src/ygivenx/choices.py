"""The names of choices: one vocabulary for functions, commands and messages (`docs/glossary.md`)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from .errors import refuse_unknown

Bos = bool | Literal["auto"]  # auto: where the tokenizer itself adds one
Control = Literal["refuse", "text", "parse"]  # a row's text that holds control tokens
Denominator = Literal["tokens", "sequence"]
HarnessBorder = Literal["harness", "exact"]  # lm-evaluation-harness' own rule, or x + y as written
Route = Literal["auto", "plain", "blocks", "flex", "varlen", "dense", "unshared"]
ScoreBorder = Literal["joint", "split"]  # x + y as one text, or each by itself
ScoreOverflow = Literal["refuse", "left", "roll"]  # of a text longer than the model reads
Severity = Literal["error", "warning", "info"]  # most severe first


def require_choice(name: str, value: object, choice: Any) -> None:
    """Raise ConfigError unless `value` is one of the words of `choice`, a Literal."""
    refuse_unknown(name, [value], get_args(choice))
