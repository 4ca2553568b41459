"""What both trainings share: a wall-clock budget, a schedule over it, averaged weights, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path

import torch
from torch import nn


class Budget:
    """Seconds of training out of `total` for the whole schedule, `spent` of them in earlier runs."""

    def __init__(self, minutes: float, total_minutes: float, spent: float = 0.0):
        self.start, self.limit, self.total, self.spent = time.time(), minutes * 60, total_minutes * 60, spent

    def restart(self) -> None:
        """The clock starts now: compilation and the like are not training."""
        self.start = time.time()

    def elapsed(self) -> float:
        return self.spent + time.time() - self.start

    def over(self) -> bool:
        return time.time() - self.start > self.limit or self.elapsed() > self.total

    def rate(self, peak: float, warmup_seconds: float = 8.0, floor: float = 0.02) -> float:
        """Learning rate: linear warm-up, then a cosine over the whole schedule."""
        x = min(self.elapsed() / self.total, 1.0)
        return peak * min(1.0, self.elapsed() / warmup_seconds + 0.02) * (
            floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)))


class Average:
    """Exponential moving average of a module's parameters; its memory grows with the step count."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.steps = copy.deepcopy(module).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averaged, current = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in current], 1 - decay)


def optimizer(module: nn.Module, rate: float, decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in module.parameters() if p.dim() >= 2 and p.shape[1:].numel() > 1]
    vectors = [p for p in module.parameters() if not (p.dim() >= 2 and p.shape[1:].numel() > 1)]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=next(module.parameters()).is_cuda)


def save(path: Path, modules: dict[str, nn.Module], opt: torch.optim.Optimizer, **facts: object) -> None:
    """Writes to a temporary name first, so that a checkpoint is whole or not there."""
    state = {"modules": {k: m.state_dict() for k, m in modules.items()}, "optimizer": opt.state_dict(), **facts}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load(path: Path, modules: dict[str, nn.Module], opt: torch.optim.Optimizer | None, device: torch.device) -> dict:
    state = torch.load(path, map_location=device, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    if opt is not None:
        opt.load_state_dict(state["optimizer"])
    return state
