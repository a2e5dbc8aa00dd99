"""Thoughts, by whatever tags a template has: `<think>`, Mistral's `[THINK]`, Gemma's channel, Seed's, Kimi's.

The tags are found in the template's source, or in what it writes around the reasoning of a reply.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ..errors import RowError
from ..templating.inputs import REASONING_FIELDS, Inputs
from ..templating.template import Template

# An opening tag whose closing one has a slash after its first character.
_SLASHED = re.compile(
    r"[<\[◁](?=[^<>\[\]◁▷\s'\"]*(?:think|thought|reason))[^<>\[\]◁▷\s'\"/]+[>\]▷]", re.IGNORECASE
)
_OTHERS = (
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|think_start|>", "<|think_end|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<unused94>thought", "<unused95>"),
)
_TAG = r"(?:<[^<>\s]*>|\[[^\[\]\s]*\]|◁[^◁▷]*▷)"
_BEFORE, _AFTER = re.compile(rf"{_TAG}\w*\s*\Z"), re.compile(rf"\s*({_TAG})")


@dataclass(frozen=True)
class Tags:
    """The tags around a thought: (opening, closing), those of the template first."""

    pairs: tuple[tuple[str, str], ...] = ()

    @cached_property
    def opened(self) -> re.Pattern[str]:
        """A text that ends in an open thought."""
        return _any_of(rf"{re.escape(a)}\s*\Z" for a, _ in self.pairs)

    @cached_property
    def closed(self) -> re.Pattern[str]:
        """A text that ends in an empty thought, closed already."""
        return _any_of(rf"{re.escape(a)}\s*{re.escape(b)}\s*\Z" for a, b in self.pairs)

    @cached_property
    def thought(self) -> re.Pattern[str]:
        """A text that begins with a whole thought."""
        return _any_of(rf"\s*{re.escape(a)}.*?{re.escape(b)}\s*" for a, b in self.pairs)

    @cached_property
    def rest_of_thought(self) -> re.Pattern[str]:
        """A text that begins with the rest of a thought which its prompt opens."""
        return _any_of(rf".*?{re.escape(b)}\s*" for _, b in self.pairs)

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """Any of the tags: a template reads them as marks, and writes them anew."""
        return _any_of(re.escape(tag) for pair in self.pairs for tag in pair)

    def pair_of(self, prompt: str) -> tuple[str, str]:
        """The tags of the thought that a prompt opens."""
        return max(self.pairs, key=lambda pair: prompt.rfind(pair[0]))

    def without(self, text: str) -> str:
        """A text without the open or empty thought at its end."""
        return self.closed.sub("", self.opened.sub("", text))

    def thinks(self, message: Mapping[str, Any]) -> bool:
        """Whether a reply has a thought: in a field of its own, as a part of its content, or between tags in it."""
        if any(
            (m := message.get(name)) and (not hasattr(m, "strip") or m.strip()) for name in REASONING_FIELDS
        ):
            return True
        content = message.get("content")
        if isinstance(content, list):
            return any(
                part.get("type") in ("thinking", "reasoning") for part in content if isinstance(part, dict)
            )
        return content is not None and bool(content) and any(close in content for _, close in self.pairs)

    def own_thought(self, message: Mapping[str, Any], pair: tuple[str, str]) -> tuple[str, str, str] | None:
        """(reasoning, closing, answer) of a reply that brings its own, as it follows an open thought; else None.

        Closing is the text between the two, "" where the content has it.
        """
        content, reasoning = message.get("content") or "", message.get("reasoning_content")
        opening, closing = pair
        if not isinstance(content, str):
            return None
        if isinstance(reasoning, str) and reasoning.strip():
            return reasoning.strip(), f"\n{closing}\n\n", content
        if closing not in content:
            return None
        begun = content.lstrip()
        return "", "", begun[len(opening) :].lstrip() if begun.startswith(opening) else content


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or "(?!)", re.DOTALL)


@lru_cache(maxsize=256)
def _tags_in(source: str) -> tuple[tuple[str, str], ...]:
    slashed = [(t, t[0] + "/" + t[1:]) for t in dict.fromkeys(_SLASHED.findall(source))]
    pairs = [p for p in (*slashed, *_OTHERS) if p[0] in source and p[1] in source]
    think = ("<think>", "</think>")  # which data sets have, whether or not a template knows it
    return tuple(dict.fromkeys((*pairs, think)))


def tags_of(template: Template) -> Tags:
    """The tags of a template; those that only its renderings show among them."""
    pairs = _tags_in(template.source)
    shown = _tags_around(template) if len(pairs) == 1 and "reasoning" in template.source else None
    return Tags((shown, *(p for p in pairs if p != shown)) if shown else pairs)


def _tags_around(template: Template) -> tuple[str, str] | None:
    """The tags that a template writes around the reasoning of a reply; None where it shows none."""
    thought, answer = "\ue000", "\ue001"  # for private use: no template writes them
    reply: dict[str, Any] = {
        "role": "assistant",
        "content": answer,
        **dict.fromkeys(REASONING_FIELDS, thought),
    }
    try:
        text = template.render(Inputs(({"role": "user", "content": "x"}, reply)))
    except RowError:
        return None
    before, found, rest = text.partition(thought)
    opening, closing = _BEFORE.search(before), _AFTER.match(rest.partition(answer)[0])
    if not found or not opening or not closing:
        return None
    return opening[0].strip(), closing[1]
