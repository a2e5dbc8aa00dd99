"""The loss of a forest in your own loop on several processes: yx.loss runs through the wrapper.

    torchrun --nproc_per_node 2 examples/own_loop_ddp.py

Each rank has rows of its own. Ranks average gradients, so each divides by the step's whole weight / ranks.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import ygivenx as yx


def train() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = DistributedDataParallel(LlamaForCausalLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    rng = np.random.default_rng(dist.get_rank())
    weights = np.array([0] * 12 + [1] * 4, np.float32)  # the last four tokens are y
    rows = [yx.Sequence(rng.integers(0, 100, 16), weights) for _ in range(2 + dist.get_rank())]

    for step in range(41):
        # The three lines:
        weight = torch.tensor(sum(float(s.weights.sum()) for s in rows))
        dist.all_reduce(weight)
        loss = yx.loss(model, rows, denominator=weight.item() / dist.get_world_size()).value

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step:2d}: {loss.item():.3f}")
    assert loss.item() < 1, "it should have learnt its answers"


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    train()  # the wrapper has to be gone before its group is
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
