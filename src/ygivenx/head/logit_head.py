"""The logit head: the last layer of a language model, which makes logits of hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitHead:
    """logits = cap(scale·(h·weightᵀ + bias)), with cap(z) = softcap·tanh(z / softcap), or z without a softcap.

    weight [V, H], bias [V].
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def product(self, hidden: Tensor) -> Tensor:
        """h·weightᵀ + bias, [..., V]: what the layer itself gives, before scale and cap."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states [..., H], [..., V]."""
        return self.from_product(self.product(hidden))[0]

    def from_product(self, product: Tensor) -> tuple[Tensor, Tensor | float]:
        """(logits, ∂logits/∂product) of what `product` gave."""
        z = product * self.scale
        if self.softcap is None:
            return z, self.scale
        z = self.softcap * torch.tanh(z / self.softcap)
        return z, self.scale * (1 - (z / self.softcap) ** 2)

    def cap_(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """cap(z), written into z, and the cap's slope 1 − tanh²; None without a softcap."""
        if self.softcap is None:
            return z, None
        z.div_(self.softcap).tanh_()
        slope = 1 - z * z
        return z.mul_(self.softcap), slope
