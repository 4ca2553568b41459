"""What the trainings share: deadlines, a schedule over several runs, averaged weights, Muon, checkpoints."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

UNFINISHED = 3  # exit status of a run that ended before its work was done, to go on in the next one
SAVE_EVERY = 25.0  # seconds


def process_age() -> float:
    """Seconds since this process started, imports included; a minute at most, should the system tell nonsense."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return min(max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK")), 60.0)
    except (OSError, ValueError, IndexError):
        return 0.0


class Deadline:
    """When this process has to end, counted from its start; SIGTERM brings it forward to now.

    `over` says that `reserve` seconds are left, for saving and the like.  A process that is stuck
    (in a compiler, say) when no time is left at all ends at once, with its last checkpoint.
    """

    def __init__(self, seconds: float | None, reserve: float = 0.0):
        self.end = math.inf if seconds is None else time.time() - process_age() + seconds
        self.reserve, self.asked_to_stop = reserve, False
        signal.signal(signal.SIGTERM, self._stop)
        if seconds is not None:
            guard = threading.Timer(max(self.end - time.time(), 0.0), os._exit, (UNFINISHED,))
            guard.daemon = True
            guard.start()

    def _stop(self, *unused: object) -> None:
        self.asked_to_stop = True

    def left(self) -> float:
        return 0.0 if self.asked_to_stop else self.end - time.time()

    def over(self) -> bool:
        return self.left() <= self.reserve


class Schedule:
    """Seconds of training out of `total`, `spent` of them in earlier runs.  The clock stands until `begin`."""

    def __init__(self, total: float, spent: float = 0.0):
        self.started: float | None = None
        self.total, self.spent = total, spent

    def begin(self) -> None:
        """After compilation and the like, which are not training."""
        self.started = time.time()

    def elapsed(self) -> float:
        return self.spent + (time.time() - self.started if self.started else 0.0)

    def over(self) -> bool:
        return self.elapsed() >= self.total

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
    iteration as one batch.  The factor makes an update as large as AdamW's, so both can share a rate.
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


def adamw(params: Iterable[nn.Parameter], rate: float, decay: float, betas: tuple[float, float],
          share: float = 1.0) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone, at a share of the common rate."""
    params = list(params)
    matrices = [p for p in params if p.dim() >= 2 and p.shape[1:].numel() > 1]
    vectors = [p for p in params if not (p.dim() >= 2 and p.shape[1:].numel() > 1)]
    groups = [{"params": matrices, "weight_decay": decay, "share": share},
              {"params": vectors, "weight_decay": 0.0, "share": share}]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=params[0].is_cuda)


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = rate * group.get("share", 1.0)


class Checkpoint:
    """A file with modules, optimizers, steps and seconds; whole or not there, written every SAVE_EVERY seconds.

    After each writing `ship`, if any, gets to write weights that can be used as they are.
    """

    def __init__(self, path: Path, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer],
                 ship: Callable[[], None] | None = None):
        self.path, self.modules, self.optimizers, self.ship = path, modules, optimizers, ship
        self.step, self.seconds, self.saved = 0, 0.0, time.time()

    def load(self, device: torch.device) -> bool:
        """False when there is no file yet."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, map_location=device, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for opt, stored in zip(self.optimizers, state["optimizers"]):
            opt.load_state_dict(stored)
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def save(self, step: int, seconds: float) -> None:
        state = {"modules": {k: m.state_dict() for k, m in self.modules.items()},
                 "optimizers": [opt.state_dict() for opt in self.optimizers], "step": step, "seconds": seconds}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".tmp")
        torch.save(state, part)
        part.replace(self.path)
        if self.ship:
            self.ship()
        self.saved = time.time()

    def save_if_due(self, step: int, seconds: float) -> None:
        if time.time() - self.saved >= SAVE_EVERY:
            self.save(step, seconds)


def averaged_weights(path: Path) -> dict[str, Tensor]:
    """Weights from a checkpoint's averaged module, or from a .safetensors file."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
        return {name: value.float() for name, value in load_file(path).items()}
    return torch.load(path, map_location="cpu", weights_only=True)["modules"]["average"]
