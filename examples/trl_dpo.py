"""TRL's DPOTrainer with log-probabilities from a forest: prompts once, no padding, no logits of prompts.

    python examples/trl_dpo.py

Data, reference, precision, checkpoints and logging stay TRL's; only the loss is computed otherwise.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import ygivenx as yx
from ygivenx.objectives import dpo


def sequences(batch: dict[str, torch.Tensor]) -> list[yx.Sequence]:
    """TRL's padded batch, chosen first, as sequences whose reply is trained."""
    columns = (batch[k].cpu().numpy() for k in ("input_ids", "completion_mask", "attention_mask"))
    return [yx.Sequence(ids[seen > 0], mask[seen > 0]) for ids, mask, seen in zip(*columns, strict=True)]


class ForestDPOTrainer(DPOTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = yx.Targets.of(sequences(inputs))
        with torch.no_grad():
            reference = yx.log_probs(
                self.ref_model or model, batch, adapters=self.ref_model is not None
            ).sums()
        policy = yx.log_probs(model, batch).sums()
        chosen, rejected = policy.chunk(2)
        loss = dpo(chosen, rejected, *reference.chunk(2), beta=self.beta).mean()
        return (loss, {}) if return_outputs else loss


def main() -> None:
    model, tokenizer = yx.load("sample")
    pair = {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Lyon."}
    args = DPOConfig("runs/trl_dpo", max_steps=2, logging_steps=1, report_to=[], bf16=False)
    data = Dataset.from_list([pair] * 4)
    ForestDPOTrainer(
        model, copy.deepcopy(model), args=args, train_dataset=data, processing_class=tokenizer
    ).train()


if __name__ == "__main__":
    main()
