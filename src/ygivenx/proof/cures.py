"""What ends a finding in the trainer that was seen: a setting of its own, or a file of our rows."""

from __future__ import annotations

from typing import Any

_OF_MODULE = {
    "trl": "trl", "transformers": "transformers", "axolotl": "axolotl", "llamafactory": "llamafactory",
    "swift": "ms-swift", "unsloth": "unsloth", "UnslothSFTTrainer": "unsloth",
}  # fmt: skip
# By trainer and rule; tests/test_cures.py and benchmarks/field.py run them.
_SETTINGS = {
    "trl": {
        **dict.fromkeys(("loss-on-x", "tool-result-trained"), "SFTConfig(assistant_only_loss=True)"),
        "y-truncated": "SFTConfig(max_length=None), or a larger one",
        "document-cut": "SFTConfig(packing_strategy='bfd'), and max_length=None or a larger one",
    },
    "llamafactory": {"history-reasoning-trained": "mask_history: true"},
    "unsloth": {"loss-on-x": "trainer = train_on_responses_only(trainer)"},
    "mlx-lm": {"loss-on-x": "mask_prompt: true"},
    "torchtune": {"loss-on-x": "dataset.train_on_input=False"},
    "litgpt": {"loss-on-x": "--data.mask_prompt true, and the model's own --data.prompt_style"},
}
# What masks and contexts do wrong ends where a trainer is given ids and labels.
_OF_ROWS = {
    "loss-on-x", "tool-result-trained", "history-reasoning-trained", "prompt-header-trained", "y-untrained",
    "end-untrained", "only-last-turn", "context-differs", "doubled-bos", "padding-trained", "nothing-trained",
    "shifted-labels",
}  # fmt: skip
_TAKEN = "`ygx encode ROWS --model MODEL --to {} -o rows.parquet`, and {}"
_HAND_OVER = {
    "trl": _TAKEN.format("trl", "SFTTrainer(train_dataset=Dataset.from_parquet('rows.parquet'), ...)"),
    "transformers": _TAKEN.format(
        "trl",
        "Trainer(train_dataset=Dataset.from_parquet('rows.parquet'), "
        "data_collator=DataCollatorForSeq2Seq(tokenizer), ...)",
    ),
    "axolotl": _TAKEN.format("axolotl", "a data set of it without `type`"),
    "torchtune": _TAKEN.format("torchtune", "padded_collate_sft over its rows"),
}


def trainer_name(trainer: Any) -> str:
    """Which library's trainer an object is, by the classes that it derives from; "" for ours and unknown ones."""
    modules = [kind.__module__.partition(".")[0] for kind in type(trainer).__mro__]
    if "ygivenx" in modules:
        return ""
    return next((_OF_MODULE[m] for m in modules if m in _OF_MODULE), "")


def cure(trainer: str, rule: str, fix: str) -> str:
    """What ends a rule's finding: a setting of the trainer, else the rule's fix; and a file of our rows for it."""
    own = _SETTINGS.get(trainer, {}).get(rule, fix)
    rows = _HAND_OVER.get(trainer) if rule in _OF_ROWS else None
    return own if rows is None else f"{own.rstrip('.')}; or {rows}"
