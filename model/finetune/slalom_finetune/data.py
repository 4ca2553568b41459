"""What training reads: latents and text embeddings, computed once, in one safetensors file per size.

    latents   [N, 16, f, h, w]  bf16, normalised as the transformer sees them
    text      [rows, text_dim]  bf16: the real rows of all captions, one caption after the other
    begins    [captions + 1]    i64: where each caption's rows begin; the last caption is the empty prompt
    captions  [N + 1]           i64: clip n has the captions captions[n] .. captions[n + 1] - 1
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .files import save_tensors


@dataclass
class Batch:
    latents: Tensor  # [B, 16, f, h, w] float32
    text: Tensor  # [B, n, text_dim]
    mask: Tensor  # [B, n] float32


@dataclass
class LatentSet:
    latents: Tensor
    text: Tensor
    begins: Tensor
    captions: Tensor

    @classmethod
    def load(cls, path: Path) -> LatentSet:
        """Memory-mapped."""
        found = cls(**load_file(path))
        if len(found.captions) != len(found.latents) + 1 or int(found.captions[-1]) + 2 != len(found.begins):
            raise ValueError(f"{path}: captions and latents do not go together")
        return found

    def save(self, path: Path) -> None:
        save_tensors({"latents": self.latents.bfloat16(), "text": self.text.bfloat16(), "begins": self.begins,
                      "captions": self.captions}, path, {})

    def to(self, device: torch.device) -> LatentSet:
        return LatentSet(self.latents.to(device), self.text.to(device), self.begins, self.captions)

    @property
    def longest(self) -> int:
        return int(self.begins.diff().max())

    def rows(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of captions [B], padded to the longest of the whole set, and their mask."""
        begins, ends = self.begins[captions], self.begins[captions + 1]
        index = begins[:, None] + torch.arange(self.longest)
        mask = index < ends[:, None]
        device = self.text.device
        mask_there = mask.to(device)
        return self.text[index.clamp(max=len(self.text) - 1).to(device)] * mask_there[..., None], mask_there.float()

    def batch(self, step: int, size: int, seed: int, drop_text: float) -> Batch:
        """The batch of one step: it follows from (seed, step) alone.  Every clip comes once per epoch."""
        n = len(self.latents)
        draws = torch.Generator().manual_seed(seed * 1_000_003 + step)
        positions = torch.arange(step * size, (step + 1) * size)
        picks = torch.empty(size, dtype=torch.int64)
        for epoch in (positions // n).unique().tolist():
            shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 7_919 + epoch))
            inside = positions // n == epoch
            picks[inside] = shuffled[positions[inside] % n]
        counts = self.captions[picks + 1] - self.captions[picks]
        chosen = self.captions[picks] + (torch.rand(size, generator=draws) * counts).long()
        empty = len(self.begins) - 2
        chosen = torch.where(torch.rand(size, generator=draws) < drop_text, empty, chosen)
        return Batch(self.latents[picks.to(self.latents.device)].float(), *self.rows(chosen))


class SetBuilder:
    """Collects clips of one size."""

    def __init__(self) -> None:
        self._latents: list[Tensor] = []
        self._text: list[Tensor] = []
        self._captions = [0]

    def __len__(self) -> int:
        return len(self._latents)

    def add(self, latents: Tensor, texts: list[Tensor]) -> None:
        """latents [16, f, h, w]; texts [n, text_dim] each, real rows alone."""
        self._latents.append(latents.bfloat16().cpu())
        self._text += [text.bfloat16().cpu() for text in texts]
        self._captions.append(len(self._text))

    def build(self, empty: Tensor) -> LatentSet:
        """empty [n, text_dim]: the embedding of the empty prompt."""
        text = [*self._text, empty.bfloat16().cpu()]
        begins = torch.tensor([0, *(len(t) for t in text)]).cumsum(0)
        return LatentSet(torch.stack(self._latents), torch.cat(text), begins, torch.tensor(self._captions))
