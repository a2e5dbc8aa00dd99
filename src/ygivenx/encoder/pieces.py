"""Where a text can be cut so that its parts, encoded apart, give the ids of the whole.

A tokenizer of the Rust library first takes its added tokens out of the text, the leftmost and longest first, and then
normalises, splits and encodes what stands between them, each part by itself. So a text can be cut before and after an
added token that (1) is found as it stands, before normalisation, with no regard to its neighbours, and (2) no other
added token can overlap or hold. What a row's turns have in common is then encoded once. Whatever isn't known to work
part by part (`_APART`) is encoded whole, which is the slow twin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# Steps that know nothing of what stands before their part.
_APART = {
    "normalizer": {
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "StripAccents",
        "Replace",
        "Sequence",
        "Prepend",
        "Precompiled",
    },
    "pre_tokenizer": {
        "Split",
        "ByteLevel",
        "Digits",
        "Punctuation",
        "Whitespace",
        "WhitespaceSplit",
        "Sequence",
    },
    "post_processor": {"TemplateProcessing", "ByteLevel", "Sequence"},
}
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}


def cutting_tokens(backend: Any) -> re.Pattern[str] | None:
    """A pattern of the tokens around which this tokenizer's texts can be cut; None if there are none."""
    settings = json.loads(backend.to_str())
    model = settings["model"]
    if model.get("type") not in _MODELS or model.get("dropout") or backend.encode_special_tokens:
        return None
    if not all(_apart(settings.get(step), known) for step, known in _APART.items()):
        return None
    added = settings["added_tokens"]
    alone = sorted(_alone(added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, alone))) if alone else None


def _apart(step: Mapping[str, Any] | None, known: set[str]) -> bool:
    if step is None:
        return True
    inner: list[Any] = next(
        (v for k, v in step.items() if k in ("normalizers", "pretokenizers", "processors")), []
    )
    trims = step["type"] == "ByteLevel" and "processors" not in step and step.get("trim_offsets")
    moves = trims and known is _APART["post_processor"]  # its offsets depend on the place in the text
    return step["type"] in known and not moves and all(_apart(i, known) for i in inner)


def _alone(added: list[dict[str, Any]]) -> list[str]:
    """The special tokens that nothing can overlap, by what they are and how they are found."""
    raw = [t["content"] for t in added if not t["normalized"]]
    tails = {t[i:] for t in raw for i in range(1, len(t))}
    everything = "\0".join(raw)
    return [
        t["content"]
        for t in added
        if t["special"] and not (t["normalized"] or t["lstrip"] or t["rstrip"] or t["single_word"])
        if _bounded(t["content"]) and everything.count(t["content"]) == 1
        if not any(t["content"][:n] in tails for n in range(1, len(t["content"]) + 1))
    ]


def _bounded(token: str) -> bool:
    """Whether it begins and ends in what is neither white space nor part of a word, to which flags of others look."""
    ends = (token[:1], token[-1:])
    return all(end and not end.isspace() and not end.isalnum() and end != "_" for end in ends)
