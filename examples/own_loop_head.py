"""The selective head in your own loop: hidden states, a head's weight, and triples (row, target, weight).

    python examples/own_loop_head.py

A tiny random model learns to answer; only the answers' rows meet the head.
"""

import torch
from torch import nn

from ygivenx import selective_cross_entropy


def main() -> None:
    torch.manual_seed(0)
    vocabulary, size = 1000, 64
    body = nn.Sequential(nn.Embedding(vocabulary, size), nn.Linear(size, size), nn.Tanh())
    head = nn.Linear(size, vocabulary)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3)

    tokens = torch.randint(0, vocabulary, (8, 33))
    trained = torch.zeros(8, 32)
    trained[:, 24:] = 1.0  # the last tokens are y; the weights may be any numbers

    for step in range(61):
        hidden = body(tokens[:, :-1]).flatten(0, 1)
        # The three lines:
        rows = trained.flatten().nonzero()[:, 0]
        targets, weights = tokens[:, 1:].flatten()[rows], trained.flatten()[rows] / trained.sum()
        log_p, loss = selective_cross_entropy(hidden, head.weight, rows, targets, weights, bias=head.bias)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:2d}: {loss.item():.3f} nats per token, least likely {log_p.min():.2f}")
    assert loss.item() < 1, "it should have learnt its answers"


if __name__ == "__main__":
    main()
