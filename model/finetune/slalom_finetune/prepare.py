"""Clips with captions -> latents and text embeddings (data.py), by a model folder's own VAE and text encoder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .data import LatentSet, SetBuilder
from .text import END, TextEncoder, Tokenizer
from .vae import WanVae


def listed(file: Path) -> Iterator[tuple[Path, list[str]]]:
    """A JSON list of {"file", "caption"} or {"file", "captions"}; files are relative to it."""
    for entry in json.loads(file.read_text()):
        yield file.parent / entry["file"], entry.get("captions") or [entry["caption"]]


def read_clip(file: Path, frames: int, height: int, width: int) -> Tensor | None:
    """float32 [3, frames, height, width] in [-1, 1] by ffmpeg: scaled to cover, cropped in the middle, the first
    frames.  None when the clip is too short."""
    scale = f"scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height}"
    command = ["ffmpeg", "-v", "error", "-i", str(file), "-vf", scale, "-frames:v", str(frames), "-f", "rawvideo",
               "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    clip = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, height, width, 3)
    if len(clip) < frames:
        return None
    return clip.permute(3, 0, 1, 2).float() / 127.5 - 1


class TextSource:
    """Embeds captions, each of them once."""

    def __init__(self, model: Path, device: torch.device):
        self.tokens, self.device, self._known = Tokenizer(model / "tokenizer"), device, {}
        low = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.encoder = TextEncoder.load(model / "text_encoder", low).to(device)

    @torch.no_grad()
    def embed(self, caption: str) -> Tensor:
        if caption not in self._known:
            ids = self.tokens.encode(caption).to(self.device)
            self._known[caption] = self.encoder(ids).bfloat16().cpu()
        return self._known[caption]


@torch.no_grad()
def prepare(model: Path, clips: Path, frames: int, height: int, width: int, device: torch.device) -> LatentSet:
    if frames % 4 != 1 or height % 16 or width % 16:
        raise ValueError(f"{width}x{height}x{frames}: frames must be 4 n + 1, sides multiples of 16")
    entries, builder = list(listed(clips)), SetBuilder()
    text = TextSource(model, device)
    embedded = [[text.embed(caption) for caption in captions] for _, captions in entries]
    empty = text.embed("")
    del text  # the text encoder is the largest network by far
    vae = WanVae.load(model / "vae").to(device)
    for (file, _), captions in zip(entries, embedded):
        clip = read_clip(file, frames, height, width)
        if clip is None:
            print(f"{file}: fewer than {frames} frames, left out", flush=True)
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            builder.add(vae.encode(clip[None].to(device))[0], captions)
    if not len(builder):
        raise ValueError(f"{clips}: no clip has {frames} frames")
    return builder.build(empty)


@torch.no_grad()
def from_recipe(model: Path, latents: Path, device: torch.device, at_most: int = 1 << 40) -> LatentSet:
    """What model/demo/recipe/latents.py wrote: parts with latents [n, 16, f, h, w] as encoded, ids [n, captions, tokens]."""
    parts, count = [], 0
    for file in sorted(latents.glob("*.pt")):
        if count < at_most:
            stored = torch.load(file, map_location="cpu", weights_only=True)
            parts.append({name: values[:at_most - count] for name, values in stored.items()})
            count += len(parts[-1]["ids"])
    if not parts:
        raise ValueError(f"{latents}: no parts, {latents}/*.pt")
    vae, encoder = WanVae.load(model / "vae"), TextEncoder.load(model / "text_encoder").to(device)
    keys = [[tuple(i for i in ids if i) for ids in captions] for part in parts for captions in part["ids"].tolist()]
    lengths: dict[int, set[tuple[int, ...]]] = {}
    for key in (key for captions in keys for key in captions):
        lengths.setdefault(len(key), set()).add(key)
    known: dict[tuple[int, ...], Tensor] = {}
    for same in map(sorted, lengths.values()):  # captions of one length need no mask
        for some in (same[i:i + 1024] for i in range(0, len(same), 1024)):
            known |= zip(some, encoder(torch.tensor(some, device=device)).bfloat16().cpu())
    builder = SetBuilder()
    for one, captions in zip((one for part in parts for one in part["latents"]), keys):
        builder.add((one.float() - vae.mean) / vae.std, [known[key] for key in captions])
    return builder.build(encoder(torch.tensor([END], device=device)))
