"""The templates that TRL ships, each with a small byte-level tokenizer that has the tokens they write."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# What templates write and tokenizers have as special tokens.
_SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}]+\|?>|<[a-z_]+\|>|<｜[^<>]*?｜>|</?s>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|"
    r"SYSTEM_PROMPT|THINK|ARGS|CALL_ID|TOOL_CONTENT)\]|"
    r"<(?:bos|eos|start_of_turn|end_of_turn|end_of_utterance|beginning_of_sentence|end_of_sentence|sep)>|"
    r"<SPECIAL_\d+>|<seed:[a-z]+>|\[\|[a-z]+\|\]|\]~!?b[\[\]]|\[e~\["
)
# The eos of a family where it isn't the first of these that its template writes.
_EOS = (
    "<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<end_of_turn>", "<turn|>",
    "<end_of_utterance>", "<|return|>", "<|eot|>", "</s>", "<|end|>", "<|endoftext|>",
)  # fmt: skip
_OF_FAMILY = {"phi": "<|endoftext|>", "glm": "<|endoftext|>", "gemma": "<eos>", "llama3": "<|end_of_text|>"}
# Tokens of theirs by which generation stops, though they aren't special: from their generation configs.
_STOPS_OF_FAMILY = {"poolside-Laguna": ("</assistant>",)}
# By what generation stops under a family's template: what its models are trained to write last.
_ENDS_OF_FAMILY = {
    **dict.fromkeys(("qwen", "nemotron", "lfm2", "smollm2"), ("<|im_end|>",)),
    **dict.fromkeys(("idefics3", "smolvlm"), ("<end_of_utterance>",)),
    **dict.fromkeys(("gemma4", "diffusion_gemma"), ("<turn|>", "<|tool_response>")),
    "gemma": ("<end_of_turn>",),
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "llava_next": ("</s>",),
    "muse_glimmer": ("<|eot|>", "<|eom|>"),
    "phi3": ("<|end|>",),
}
_CORPUS = [
    "the assistant said that it is 4, and the user asked: what is it?\n\nThe weather in Lisbon is clear.\n",
    '{"name": "weather", "arguments": {"city": "Lisbon"}}\n</think>\n\n<tool_call>\n  words and    spaces',
] * 4


def stock_templates() -> dict[str, str]:
    """The shipped templates by name; empty without TRL."""
    found = find_spec("trl")
    if found is None or found.origin is None:
        return {}
    folder = Path(found.origin).parent / "chat_templates"
    return {p.stem: p.read_text() for p in sorted(folder.glob("*.jinja"))}


def stops_for(name: str) -> tuple[str, ...]:
    """The stops, beside the eos, of the family that a template's name tells."""
    return next((stops for family, stops in _STOPS_OF_FAMILY.items() if family in name), ())


def ends_for(name: str) -> tuple[str, ...]:
    """The tokens that end a turn in the family that a template's name tells."""
    return next((ends for family, ends in _ENDS_OF_FAMILY.items() if name.startswith(family)), ())


def tokenizer_for(name: str, template: str) -> PreTrainedTokenizerFast:
    family = next((eos for prefix, eos in _OF_FAMILY.items() if name.startswith(prefix)), None)
    special = sorted(set(_SPECIAL.findall(template)))
    eos = family or next((t for t in _EOS if t in special), "</s>")
    bos = "<s>" if eos == "</s>" else "<bos>"
    made = _copy()
    made.add_special_tokens([AddedToken(t, special=True) for t in (bos, eos, *special, *ends_for(name))])
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in stops_for(name)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def _copy() -> Tokenizer:
    return Tokenizer.from_str(_bytes())


@lru_cache(maxsize=1)
def _bytes() -> str:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(_CORPUS, trainer)
    return inner.to_str()
