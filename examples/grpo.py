"""GRPO (DeepSeekMath, 2024) in one loop: eight completions of a prompt are one forest, the prompt is computed once.

    python examples/grpo.py

The reward here is the share of digits in a reply; put yours in its place.
"""

from __future__ import annotations

import numpy as np
import torch

import ygivenx as yx
from ygivenx.objectives import group_advantages, policy_gradient

GROUP = 8


def reward(text: str) -> float:
    return sum(c.isdigit() for c in text) / max(len(text), 1)


def main(steps: int = 3, tokens: int = 12) -> list[float]:
    model, tokenizer = yx.load("sample")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    prompt = tokenizer("The first numbers are", return_tensors="pt").to(model.device)
    start, means = prompt.input_ids.shape[1], []
    torch.manual_seed(0)
    for step in range(steps):
        sampled = model.generate(
            **prompt, do_sample=True, num_return_sequences=GROUP, min_new_tokens=tokens, max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id, top_k=0, top_p=1.0,
        )  # fmt: skip
        rewards = torch.tensor([reward(tokenizer.decode(ids[start:])) for ids in sampled])
        weights = (np.arange(sampled.shape[1]) >= start).astype(np.float32)
        batch = yx.Targets.of(yx.Sequence(ids.numpy(), weights) for ids in sampled.cpu())
        policy = yx.log_probs(model, batch, entropy=True)
        loss = policy_gradient(policy, group_advantages(rewards, GROUP).to(policy.log_p.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(float(rewards.mean()))
        print(
            f"step {step}: reward {means[-1]:.3f}, entropy {policy.entropy.mean():.2f} nats, {batch.forest}"
        )
    return means


if __name__ == "__main__":
    main()
