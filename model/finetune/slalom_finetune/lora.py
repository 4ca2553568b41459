"""A linear layer that may carry a low-rank change of its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """y = (W + B A) x + b.  Starts without A and B; with them, B = 0, so that nothing changes at first."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None

    def add_lora(self, rank: int, generator: torch.Generator) -> None:
        """The scale alpha / r is 1: it is part of B."""
        device = self.weight.device
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device)
        drawn = torch.randn(self.lora_A.weight.shape, generator=generator) * self.in_features**-0.5
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor, adapted: bool = True) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if adapted and self.lora_A is not None:
            y = y + self.lora_B(self.lora_A(x))
        return y
