"""The names of choices: one vocabulary for functions, commands and messages (`docs/glossary.md`)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from .errors import refuse_unknown

Bos = bool | Literal["auto"]  # auto: where the tokenizer itself adds one
Border = Literal[
    "auto", "refuse", "mask", "split", "y"
]  # a token that holds the end of x and the beginning of y
Context = Literal["inference", "rendered"]  # what a reply is trained after
Control = Literal["refuse", "text", "parse"]  # a row's text that holds control tokens
Dropped = Literal["refuse", "warn"]  # a part that would be trained, and that the template leaves out
Overflow = Literal["refuse", "drop_turns", "drop_reply", "truncate"]  # of a row longer than max_length
Thoughts = Literal["as_written", "off", "empty", "empty_masked"]  # of replies without one
Denominator = Literal["tokens", "sequence"]
HarnessBorder = Literal["harness", "exact"]  # lm-evaluation-harness' own rule, or x + y as written
Route = Literal["auto", "plain", "blocks", "flex", "varlen", "dense", "unshared"]
ScoreBorder = Literal["joint", "split"]  # x + y as one text, or each by itself
ScoreOverflow = Literal["refuse", "left", "roll", "stride"]  # of a text longer than the model reads
Severity = Literal["error", "warning", "info"]  # most severe first


def require_choice(name: str, value: object, choice: Any) -> None:
    """Raise ConfigError unless `value` is one of the words of `choice`, a Literal."""
    refuse_unknown(name, [value], get_args(choice))
