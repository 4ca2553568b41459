"""What both trainings share: a wall-clock budget, a schedule over it, averaged weights, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Newton-Schulz), for weight matrices and convolutions.

    A convolution counts as the matrix [outputs, inputs * taps].  Matrices of one shape go through the
    iteration as one batch.  The factor makes an update as large
    as AdamW's, so both can share a rate.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @staticmethod
    def orthogonalised(g: Tensor, steps: int = 5) -> Tensor:
        """[n, rows, columns] -> about U V^T of each matrix."""
        x = g.bfloat16()
        if g.shape[1] > g.shape[2]:
            x = x.mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):
            square = x @ x.mT
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return (x.mT if g.shape[1] > g.shape[2] else x).float()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, params in shapes.items():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                looked_ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = self.orthogonalised(torch.stack([g.flatten(1) for g in looked_ahead]))
                update *= 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, [u.view(p.shape) for u, p in zip(update, params)], alpha=-group["lr"])


def adamw(params: Iterable[nn.Parameter], rate: float, decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    params = list(params)
    matrices = [p for p in params if p.dim() >= 2 and p.shape[1:].numel() > 1]
    vectors = [p for p in params if not (p.dim() >= 2 and p.shape[1:].numel() > 1)]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=params[0].is_cuda)


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = rate


def save(path: Path, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer], **facts: object) -> None:
    """Writes to a temporary name first, so that a checkpoint is whole or not there."""
    state = {"modules": {k: m.state_dict() for k, m in modules.items()},
             "optimizers": [opt.state_dict() for opt in optimizers], **facts}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load(path: Path, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer],
         device: torch.device) -> dict:
    state = torch.load(path, map_location=device, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    for opt, stored in zip(optimizers, state["optimizers"]):
        opt.load_state_dict(stored)
    return state
