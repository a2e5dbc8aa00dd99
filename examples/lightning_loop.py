"""The loss of a forest in Lightning: a pack is a micro-batch, and the training step is one call.

    pip install lightning
    python examples/lightning_loop.py

Lightning adds up the gradients of `accumulate_grad_batches` packs and divides by their number; the denominator below
makes of that the mean over all tokens of the step.
"""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ygivenx as yx

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl

PACKS_PER_STEP = 2


class SelectiveLoss(pl.LightningModule):
    def __init__(self, model: torch.nn.Module, step_weight: float) -> None:
        super().__init__()
        self.model, self.denominator = model, step_weight / PACKS_PER_STEP

    def training_step(self, forest: yx.Forest, _: int) -> torch.Tensor:
        loss = yx.loss(self.model, forest, denominator=self.denominator).value
        self.log("loss", loss, batch_size=1)
        return loss

    def transfer_batch_to_device(self, batch: yx.Forest, *_: object) -> yx.Forest:
        return batch  # its arrays go to the model's device where they are needed

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(epochs: int = 30, **options: object) -> float:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    weights = np.array([0] * 12 + [1] * 4, np.float32)  # the last four tokens are y
    rows = [yx.Sequence(rng.integers(0, 100, 16), weights) for _ in range(4)]
    packs = list(yx.pack(rows, max_tokens=32))
    step_weight = sum(float(f.weight.sum()) for f in packs[:PACKS_PER_STEP])  # all steps here weigh the same
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    module = SelectiveLoss(LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)), step_weight)
    trainer = pl.Trainer(max_epochs=epochs, accumulate_grad_batches=PACKS_PER_STEP, **options)
    trainer.fit(module, torch.utils.data.DataLoader(packs, batch_size=None))
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    print(f"loss at the end: {main():.3f} nats per token")
