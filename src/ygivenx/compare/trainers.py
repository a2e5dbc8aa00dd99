"""The trainers that `ygx compare` knows: which package, which version the adapter was written for, which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, nearest


@dataclass(frozen=True)
class OtherTrainer:
    """version: what the adapter was tried with. settings: its own choices by name, the default first.

    intent: what the trainer says of its masks, in its own terms. further: what pip needs beside `package==version`.
    """

    package: str
    version: str
    settings: Mapping[str, Mapping[str, Any]]
    intent: str
    further: str = ""

    @property
    def requirements(self) -> list[str]:
        """What pip is given, for a Python that has torch and transformers already."""
        return [*self.further.split(), f"{self.package}=={self.version}"]


_ALL = "the default trains all tokens"
TRAINERS: dict[str, OtherTrainer] = {
    "trl": OtherTrainer(
        "trl", "1.16.0",
        {"default": {}, "assistant_only_loss": {"assistant_only_loss": True}},
        f"{_ALL} of a chat; assistant_only_loss those between generation markers",
    ),
    "transformers": OtherTrainer(
        "transformers", "5.23.0",
        {"collator": {}, "assistant_tokens_mask": {"mask": True}},
        "the collator for language models trains all; return_assistant_tokens_mask what a template marks",
    ),
    "axolotl": OtherTrainer(
        "axolotl", "0.19.0",
        {"default": {}, "train_on_eos=all": {"train_on_eos": "all"}},
        "type chat_template: the contents of the assistant's turns and the token that ends each",
    ),
    "llamafactory": OtherTrainer(
        "llamafactory", "0.9.5",
        {"default": {}, "mask_history": {"mask_history": True}, "formatting=sharegpt": {"formatting": "sharegpt"}},
        "its own template by name: every reply and its end, history without thoughts; by default data of "
        "formatting=openai, for which its converter writes the system prompt 'detailed thinking off'",
    ),
    "ms-swift": OtherTrainer(
        "ms-swift", "4.6.0",
        {"default": {}, "loss_scale=last_round": {"loss_scale": "last_round"}},
        "its own template by name: every reply and its end",
    ),
    "unsloth": OtherTrainer(
        "unsloth", "2026.10.9",
        {"default": {}, "train_on_responses_only": {"responses_only": True}},
        f"{_ALL} of a rendered text; train_on_responses_only what follows the header of a reply",
    ),
    "renderers": OtherTrainer(
        "renderers", "0.1.12",
        {"default": {}},
        "the tokens that a model samples at inference, by a renderer for each family",
        "httpx==0.28.1",
    ),
    "tinker-cookbook": OtherTrainer(
        "tinker-cookbook", "0.6.1",
        {"all_assistant_messages": {}, "last_assistant_message": {"what": "LAST_ASSISTANT_MESSAGE"}},
        "supervised examples that match the generation prompt, several where history is rewritten",
        "--no-deps tinker==0.38.0 chz==0.4.0 pillow==11.3.0 httpx==0.28.1 httpcore==1.0.9 distro==1.9.0 orjson==3.13.0 "
        "protobuf==6.33.6 zstandard==0.25.0 pyqwest==0.12.0 tml-renderers==0.2.1",
    ),
    "mlx-lm": OtherTrainer(
        "mlx-lm", "0.32.2",
        {"default": {}, "mask_prompt": {"mask_prompt": True}},
        f"{_ALL}; mask_prompt what follows the prompt of the last message",
        "--no-deps",  # Apple's mlx isn't needed for its data sets
    ),
    "torchtitan": OtherTrainer(
        "torchtitan", "0.3.0",
        {"default": {}},
        "one question and one answer: what follows the generation prompt, without a last newline",
    ),
    "torchtune": OtherTrainer(
        "torchtune", "0.6.1",
        {"default": {}, "train_on_input": {"train_on_input": True}},
        "messages of the assistant with their headers and ends",
        "torchao==0.9.0",
    ),
    "litgpt": OtherTrainer(
        "litgpt", "0.5.13",
        {"default": {}, "mask_prompt, model's style": {"mask_prompt": True, "prompt_style": "model"}},
        f"one instruction and one output; {_ALL} of Alpaca's format, mask_prompt the output and the tokenizer's eos",
        "--no-deps lightning==2.6.6 lightning-utilities==0.15.3 pytorch-lightning==2.6.6 torchmetrics==1.9.0 "
        "jsonargparse==4.41.0 docstring-parser==0.18.0 typeshed-client==2.15.0",
    ),
}  # fmt: skip


def trainer_of(name: str) -> OtherTrainer:
    """A trainer by name; raises ConfigError for one that isn't known."""
    if name not in TRAINERS:
        raise ConfigError(
            f"unknown trainer {name!r}{nearest(name, TRAINERS)}", fix=f"known: {', '.join(TRAINERS)}"
        )
    return TRAINERS[name]
