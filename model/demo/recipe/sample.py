"""Draws clips with the trained networks: classifier-free guidance and UniPC (order 2, bh2, predict x0)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from text_encoder import TextEncoder
from tokenizer import MAX_TOKENS
from transformer import WanTransformer
from vae import WanVae

SHIFT = 3.0


def shifted(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def sigmas_of(steps: int) -> list[float]:
    """steps + 1 noise levels from nearly 1 down to 0."""
    sigmas = shifted(1 - torch.arange(steps, dtype=torch.float64) / steps * 0.999)
    sigmas[0] -= 1e-6
    return [*sigmas.tolist(), 0.0]


def unipc(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int) -> Tensor:
    """From noise x to a sample; velocity(x, 1000 sigma) is the network.  All in float32."""
    sigma = sigmas_of(steps)
    lam = [math.log((1 - s) / s) if s else math.inf for s in sigma]
    clean: list[Tensor] = []  # the network's estimates of x0
    corrected = x
    for i in range(steps):
        clean.append(x - sigma[i] * velocity(x, float(int(1000 * sigma[i]))))
        if i > 0:
            h = lam[i] - lam[i - 1]
            e = math.expm1(-h)
            base = sigma[i] / sigma[i - 1] * corrected - (1 - sigma[i]) * e * clean[-2]
            change = 0.5 * (clean[-1] - clean[-2])
            if i > 1:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi = -e / h - 1
                b1, b2 = phi / e, 2 * (-phi / h - 0.5) / e
                rho = (b1 - b2) / (1 - r)
                change = rho * (clean[-3] - clean[-2]) / r + (b1 - rho) * (clean[-1] - clean[-2])
            corrected = base - (1 - sigma[i]) * e * change
        if i == steps - 1:
            return clean[-1]
        h = lam[i + 1] - lam[i]
        e = math.expm1(-h)
        x = sigma[i + 1] / sigma[i] * corrected - (1 - sigma[i + 1]) * e * clean[-1]
        if 0 < i < steps - 1:
            r = (lam[i - 1] - lam[i]) / h
            x = x - 0.5 * (1 - sigma[i + 1]) * e * (clean[-2] - clean[-1]) / r
    return x


@dataclass
class Networks:
    """What it takes to draw a clip.  mean, std [16]: the latents' statistics."""

    vae: WanVae
    text: TextEncoder
    transformer: WanTransformer
    mean: Tensor
    std: Tensor


@torch.no_grad()
def sample(networks: Networks, ids: Tensor, shape: tuple[int, int, int], steps: int = 20,
           guidance: float = 3.0, seed: int = 0) -> Tensor:
    """ids [B, tokens] -> clips [B, 3, F, H, W] in about [-1, 1]; shape is the latent's (f, h, w)."""
    device, batch = ids.device, ids.shape[0]
    noise = torch.randn(batch, 16, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    empty = torch.zeros(batch, MAX_TOKENS, dtype=torch.long, device=device)
    empty[:, 0] = 1
    ids = torch.cat([ids, empty])
    mask = (ids > 0).float()
    with torch.autocast(device.type, torch.bfloat16):
        text = networks.text(ids, mask)
        rope = networks.transformer.rope(noise)

        def velocity(x: Tensor, t: float) -> Tensor:
            times = torch.full((2 * batch,), t, device=device)
            wanted, plain = networks.transformer(torch.cat([x, x]), times, text, mask, rope).float().chunk(2)
            return plain + guidance * (wanted - plain)

        x = unipc(velocity, noise, steps)
        z = x * networks.std.view(1, -1, 1, 1, 1) + networks.mean.view(1, -1, 1, 1, 1)
        return torch.cat([networks.vae.decode(part) for part in z.split(4)]).float()
