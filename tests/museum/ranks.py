"""One rank of a distributed trainer, audited: `torchrun ranks.py FOLDER` reads task.json and writes report.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ygivenx.proof.auditing import audit


def collate(features):
    width = max(len(f["input_ids"]) for f in features)
    columns = {"input_ids": 0, "labels": -100}
    return {
        k: torch.tensor([f[k] + [fill] * (width - len(f[k])) for f in features])
        for k, fill in columns.items()
    }


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=task["vocab_size"], hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=1, report_to=[], use_cpu=True, **task["options"]
    )
    trainer = Trainer(
        LlamaForCausalLM(config), args, collate, train_dataset=Dataset.from_list(task["features"])
    )
    report = audit(trainer=trainer, suppress={"rows-unrecognised": "the division is what is shown here"})
    if args.process_index == 0:
        (folder / "report.json").write_text(report.to_json())
    # As `ygivenx.Trainer.end_ranks`: the wrapper of the model goes before its process group.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
