"""Draws clips in PyTorch: guidance and UniPC, from slalomd's noise.  For looking at adapters while they are trained,
and for the linear branch alone, which slalomd does not run."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .adapter import load_adapter
from .deadline import UNFINISHED, Deadline
from .noise import normal
from .options import AttentionOptions
from .prepare import TextSource
from .vae import WanVae
from .wan import WanTransformer


CHANGES = ("topk", "block_q", "block_k", "tile")  # of untrained attention's options


def sigmas_of(steps: int, shift: float) -> list[float]:
    """steps + 1 noise levels from nearly 1 down to 0 (diffusers' flow sigmas)."""
    u = 1 - torch.arange(steps, dtype=torch.float64) / steps * 0.999
    sigmas = shift * u / (1 + (shift - 1) * u)
    sigmas[0] -= 1e-6
    return [*sigmas.tolist(), 0.0]


def unipc(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int, shift: float) -> Tensor:
    """From noise to a sample: UniPC of order 2 (bh2, predicting x0), as diffusers configures it for Wan."""
    sigma = sigmas_of(steps, shift)
    lam = [math.log((1 - s) / s) if s else math.inf for s in sigma]
    clean: list[Tensor] = []  # the network's estimates of x0
    corrected = x
    for i in range(steps):
        clean.append(x - sigma[i] * velocity(x, float(int(1000 * sigma[i]))))
        if i > 0:
            corrected = _correct(sigma, lam, clean, corrected, i)
        if i == steps - 1:
            break
        h = lam[i + 1] - lam[i]
        e = math.expm1(-h)
        x = sigma[i + 1] / sigma[i] * corrected - (1 - sigma[i + 1]) * e * clean[-1]
        if 0 < i < steps - 1:
            r = (lam[i - 1] - lam[i]) / h
            x = x - 0.5 * (1 - sigma[i + 1]) * e * (clean[-2] - clean[-1]) / r
    return clean[-1]


def _correct(sigma: list[float], lam: list[float], clean: list[Tensor], corrected: Tensor, i: int) -> Tensor:
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
    return base - (1 - sigma[i]) * e * change


class Sampler:
    def __init__(self, model: Path, adapter: Path | None, attention: str, device: torch.device, **changes: object):
        """Without `adapter`, "sla" and "salad" run untrained, with `changes` to their options; of an adapter's own
        options only topk can change."""
        self.device, self.text = device, TextSource(model, device)
        self.transformer = WanTransformer.load(model / "transformer")
        self.adapted = attention != "dense"
        if adapter:
            options = load_adapter(self.transformer, adapter)
            if unlike := set(changes) - {"topk"}:
                raise ValueError(f"an adapter has its own {', '.join(sorted(unlike))}")
            for block in self.transformer.blocks:
                part = block.attn1.sla or block.attn1.salad
                part.options = replace(part.options, **changes)
        elif self.adapted:
            self.transformer.adapt(AttentionOptions.for_kind(attention, **changes))
        self.transformer.to(device).eval().requires_grad_(False)
        self.vae = WanVae.load(model / "vae").to(device)

    @torch.no_grad()
    def draw(self, captions: list[str], seeds: list[int], shape: tuple[int, int, int], steps: int, guidance: float,
             shift: float) -> Tensor:
        """Latent (f, h, w) -> uint8 [B, F, H, W, 3]."""
        device, count = self.device, len(captions)
        x = torch.stack([normal(seed, (16, *shape)) for seed in seeds]).to(device)
        rows = [self.text.embed(caption) for caption in [*captions, *[""] * count]]
        mask = torch.zeros(2 * count, max(map(len, rows)))
        text = torch.zeros(*mask.shape, rows[0].shape[1])
        for i, one in enumerate(rows):
            text[i, :len(one)], mask[i, :len(one)] = one, 1
        text, mask, tokens = text.to(device), mask.to(device), self.transformer.tokens(x)

        def velocity(x: Tensor, t: float) -> Tensor:
            times = torch.full((2 * count,), t, device=device)
            wanted, plain = self.transformer(torch.cat([x, x]), times, text, mask, tokens, self.adapted).chunk(2)
            return plain + guidance * (wanted - plain)

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            x = unipc(velocity, x, steps, shift)
            clips = torch.cat([self.vae.decode(part) for part in x.split(4)])
        return ((clips + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()


def write_clip(frames: Tensor, file: Path, fps: int) -> None:
    """uint8 [F, H, W, 3] as H.264, as a picture (.png) or as it is (.npy, which takes no ffmpeg)."""
    part = file.with_name(f".part{file.suffix}")
    if file.suffix == ".npy":
        np.save(part, frames.numpy())
        part.replace(file)
        return
    _, height, width, _ = frames.shape
    coding = [] if file.suffix == ".png" else ["-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p"]
    command = ["ffmpeg", "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r",
               str(fps), "-i", "-", *coding, *(["-frames:v", "1"] if file.suffix == ".png" else []), str(part)]
    subprocess.run(command, input=frames.numpy().tobytes(), check=True)
    part.replace(file)


def add_sample_arguments(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("sample", help="draws clips with an adapter, in PyTorch")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="attention/{sla,salad,linear}.safetensors")
    parser.add_argument("--attention", choices=("dense", "sla", "salad"), default="sla")
    parser.add_argument("--topk", type=float)
    parser.add_argument("--block-q", type=int, help="of untrained attention, as the next two")
    parser.add_argument("--block-k", type=int)
    parser.add_argument("--tile", type=lambda text: tuple(map(int, text.split(","))), help="token order: FRAMES,ROWS,COLUMNS")
    parser.add_argument("--captions", type=Path, required=True, help='JSON list of {"file", "caption"}; clip i has seed i')
    parser.add_argument("--out", type=Path, required=True, help="folder; files that are there already stay")
    parser.add_argument("--raw", action="store_true", help="frames as .npy, for machines without ffmpeg")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--deadline-seconds", type=float, help="ends before, with status 3, to go on in the next call")
    parser.add_argument("--device")


def run_sample(args: argparse.Namespace, device: torch.device) -> int:
    deadline = Deadline(args.deadline_seconds)
    entries = json.loads(args.captions.read_text())
    width, height = map(int, args.size.lower().split("x"))
    shape = ((args.frames - 1) // 4 + 1, height // 8, width // 8)
    args.out.mkdir(parents=True, exist_ok=True)
    files = [args.out / entry["file"] for entry in entries]
    files = [file.with_suffix(".npy") if args.raw else file for file in files]
    wanted = [i for i, file in enumerate(files) if not file.exists()]
    changes = {name: value for name in CHANGES if (value := getattr(args, name)) is not None}
    sampler, begin = Sampler(args.model, args.adapter, args.attention, device, **changes), time.time()
    for first in range(0, len(wanted), args.batch):
        if deadline.over():
            return UNFINISHED
        seeds = wanted[first:first + args.batch]
        clips = sampler.draw([entries[i]["caption"] for i in seeds], seeds, shape, args.steps, args.guidance, args.shift)
        for i, clip in zip(seeds, clips):
            write_clip(clip, files[i], args.fps)
        print(f"{first + len(seeds)}/{len(wanted)} clips, {time.time() - begin:.1f} s", flush=True)
    return 0
