"""What others call the options of a run: `trl sft` and axolotl, by their own names.

A value is a key of ours (section.option), where needed with what to write there; what begins with `-` is refused, and
what begins with `?` is missing, both with the reason. scripts/reference.py makes docs/reference/migration.md of it.
"""

from __future__ import annotations

TRL = {
    "model_name_or_path": "model.path",
    "model_revision": "? give the directory of that revision",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "model.dtype",
    "attn_implementation": "- each route has a forest's own attention",
    "use_peft": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "load_in_4bit": "? quantised bases",
    "dataset_name": "data.path (hf:NAME)",
    "dataset_config": "data.path (hf:NAME:CONFIG)",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "dataset_num_proc": "data.processes",
    "max_length": "encoder.max_length",
    "truncation_mode": "encoder.overflow",
    "packing": "training.max_tokens (rows are always packed)",
    "completion_only_loss": "encoder.train (assistant: always)",
    "assistant_only_loss": "encoder.train (assistant, the default)",
    "eos_token": "encoder.stops",
    "per_device_train_batch_size": "training.max_tokens",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.lr_scheduler_type",
    "warmup_steps": "training.warmup_steps",
    "num_train_epochs": "training.num_train_epochs",
    "max_steps": "training.max_steps",
    "optim": "training.optim",
    "logging_steps": "training.logging_steps",
    "save_steps": "training.save_steps",
    "eval_steps": "training.eval_steps",
    "report_to": "training.report_to",
    "output_dir": "output.dir",
    "push_to_hub": "training.push_to_hub",
}
AXOLOTL = {
    "base_model": "model.path",
    "adapter": "lora.r",
    "load_in_4bit": "? quantised bases",
    "load_in_8bit": "? quantised bases",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules (all-linear, the default)",
    "lora_modules_to_save": "lora.modules_to_save",
    "peft_use_dora": "lora.use_dora",
    "datasets": "data.path, data.mix",
    "test_datasets": "data.eval_path",
    "val_set_size": "? split the file",
    "dataset_prepared_path": "data.cache",
    "roles_to_train": "encoder.train",
    "train_on_inputs": "encoder.train (assistant; all trains x, too)",
    "train_on_eos": "encoder.train (the end of each turn is trained)",
    "special_tokens": "encoder.stops",
    "sequence_len": "encoder.max_length",
    "excess_length_strategy": "encoder.overflow",
    "sample_packing": "training.max_tokens (rows are always packed)",
    "pad_to_sequence_len": "- nothing is padded",
    "micro_batch_size": "training.max_tokens",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "lr_scheduler": "training.lr_scheduler_type",
    "learning_rate": "training.learning_rate",
    "warmup_ratio": "training.warmup_steps (below 1)",
    "weight_decay": "training.weight_decay",
    "bf16": "model.dtype (bf16)",
    "fp16": "model.dtype (fp16)",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "attn_implementation": "- each route has a forest's own attention",
    "logging_steps": "training.logging_steps",
    "saves_per_epoch": "training.save_steps",
    "evals_per_epoch": "training.eval_steps",
    "wandb_project": "training.report_to (wandb; WANDB_PROJECT)",
    "output_dir": "output.dir",
}
TOOLS = {"`trl sft`": TRL, "axolotl": AXOLOTL}


def hint(name: str) -> str:
    """What an option of another tool is called here; empty for a name that none of them has."""
    ours = next((table[name] for table in TOOLS.values() if name in table), "")
    return ours.removeprefix("- ").removeprefix("? ")
