"""Clips encoded once: normalised latents and tokenised captions, kept in device memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clips import ClipSource, rendered, to_model
from vae import WanVae


@dataclass
class LatentSet:
    """latents [N, 16, f, h, w] bf16, not yet normalised; ids [N, captions, tokens] int64."""

    latents: Tensor
    ids: Tensor

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents [size, ...] and one caption each [size, tokens]."""
        pick = torch.randint(self.latents.shape[0], (size,), device=self.latents.device)
        which = torch.randint(self.ids.shape[1], (size,), device=self.ids.device)
        return self.latents[pick], self.ids[pick, which]


@torch.no_grad()
def encode_clips(vae: WanVae, source: ClipSource, seed: int, count: int, frames: int, size: int,
                 device: torch.device, held_out: bool = False, chunk: int = 16) -> LatentSet:
    """Renders `count` clips and encodes their means."""
    latents, ids = [], []
    encode = torch.compile(vae.encode) if device.type == "cuda" and count >= 1024 else vae.encode
    for packed in source.stream(seed, count, frames, held_out, batch=chunk):
        clips = to_model(rendered(packed, size, device))
        with torch.autocast(device.type, torch.bfloat16):
            mean = encode(clips.contiguous(memory_format=torch.channels_last_3d))[0]
        latents.append(mean.bfloat16())
        ids.append(torch.from_numpy(packed.ids).to(device))
    return LatentSet(torch.cat(latents), torch.cat(ids))


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, [16] float32."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)
