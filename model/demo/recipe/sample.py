"""Draws clips with the trained networks: classifier-free guidance and Euler steps.

This is training's own look at itself; the server samples with UniPC, which does better.
"""

from __future__ import annotations

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


@dataclass
class Networks:
    """What it takes to draw a clip.  mean, std [16]: the latents' statistics."""

    vae: WanVae
    text: TextEncoder
    transformer: WanTransformer
    mean: Tensor
    std: Tensor


@torch.no_grad()
def sample(networks: Networks, ids: Tensor, shape: tuple[int, int, int], steps: int = 25,
           guidance: float = 4.0, seed: int = 0) -> Tensor:
    """ids [B, tokens] -> clips [B, 3, F, H, W] in about [-1, 1]; shape is the latent's (f, h, w)."""
    device, batch = ids.device, ids.shape[0]
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, 16, *shape, device=device, generator=generator)
    empty = torch.zeros(batch, MAX_TOKENS, dtype=torch.long, device=device)
    empty[:, 0] = 1
    ids = torch.cat([ids, empty])
    mask = (ids > 0).float()
    sigmas = shifted(torch.linspace(1, 0, steps + 1, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        text = networks.text(ids, mask)
        for now, then in zip(sigmas[:-1], sigmas[1:]):
            t = (1000 * now).expand(2 * batch)
            wanted, plain = networks.transformer(torch.cat([x, x]), t, text, mask).chunk(2)
            x = x + (then - now) * (plain + guidance * (wanted - plain)).float()
        z = x * networks.std.view(1, -1, 1, 1, 1) + networks.mean.view(1, -1, 1, 1, 1)
        return torch.cat([networks.vae.decode(part) for part in z.split(4)]).float()
