"""The trainers that `ygx compare` knows: which package, which version the adapter was written for, which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, nearest


@dataclass(frozen=True)
class OtherTrainer:
    """package and version: what the adapter was tried with. settings: its own choices by name, the default first.

    intent: what the trainer says of its masks, in its own terms.
    """

    package: str
    version: str
    settings: Mapping[str, Mapping[str, Any]]
    intent: str


TRAINERS: dict[str, OtherTrainer] = {
    "trl": OtherTrainer(
        "trl", "1.16.0",
        {"default": {}, "assistant_only_loss": {"assistant_only_loss": True}},
        "the default trains all tokens of a chat; assistant_only_loss those between generation markers",
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
        {"default": {}, "mask_history": {"mask_history": True}},
        "its own template by name: every reply and its end, history without thoughts",
    ),
    "ms-swift": OtherTrainer(
        "ms-swift", "4.6.0",
        {"default": {}, "loss_scale=last_round": {"loss_scale": "last_round"}},
        "its own template by name: every reply and its end",
    ),
    "renderers": OtherTrainer(
        "renderers", "0.1.12",
        {"default": {}},
        "the tokens that a model samples at inference, by a renderer for each family",
    ),
    "tinker-cookbook": OtherTrainer(
        "tinker-cookbook", "0.6.1",
        {"all_assistant_messages": {}, "last_assistant_message": {"what": "LAST_ASSISTANT_MESSAGE"}},
        "supervised examples that match the generation prompt, several where history is rewritten",
    ),
    "mlx-lm": OtherTrainer(
        "mlx-lm", "0.32.2",
        {"default": {}, "mask_prompt": {"mask_prompt": True}},
        "the default trains all; mask_prompt what follows the prompt of the last message",
    ),
    "torchtitan": OtherTrainer(
        "torchtitan", "0.3.0",
        {"default": {}},
        "one question and one answer: what follows the generation prompt, without a last newline",
    ),
}  # fmt: skip


def trainer_of(name: str) -> OtherTrainer:
    """A trainer by name; raises ConfigError for one that isn't known."""
    if name not in TRAINERS:
        raise ConfigError(
            f"unknown trainer {name!r}{nearest(name, TRAINERS)}", fix=f"known: {', '.join(TRAINERS)}"
        )
    return TRAINERS[name]
