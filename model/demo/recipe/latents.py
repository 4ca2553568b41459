"""Clips encoded once: latents and tokenised captions.

    python latents.py --vocabulary ../tokenizer/spiece.model --vae vae.pt --out latents-256-33.pt --size 256 --frames 33

Makes as many clips as --seconds allow, --clips at most.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clips import ClipSource, rendered, to_model
from forms import choose_forms
from training import UNFINISHED, Deadline, averaged_weights
from vae import WanVae, channels_last

LEAST = 64  # clips; fewer make no set


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

    @classmethod
    def load(cls, file: Path, device: torch.device) -> LatentSet:
        stored = torch.load(file, map_location=device, weights_only=True)
        return cls(stored["latents"], stored["ids"])

    def save(self, file: Path) -> None:
        part = file.with_suffix(".tmp")
        torch.save({"latents": self.latents, "ids": self.ids}, part)
        part.replace(file)


@torch.no_grad()
def encode_clips(vae: WanVae, source: ClipSource, args: argparse.Namespace, device: torch.device,
                 deadline: Deadline) -> LatentSet:
    """Renders and encodes clips, their means, until there are enough or the time is up."""
    latents, ids, begin = [], [], time.time()
    encode = torch.compile(vae.encode, dynamic=False) if args.compile else vae.encode
    for packed in source.stream(args.seed + args.frames, args.clips, args.frames, batch=args.batch):
        clips = to_model(rendered(packed, args.size, device)).contiguous(memory_format=torch.channels_last_3d)
        if not latents and device.type == "cuda":
            print(f"latents: {choose_forms(vae, clips, backward=False)}", flush=True)
        with torch.autocast(device.type, torch.bfloat16):
            latents.append(encode(clips)[0].bfloat16())
        ids.append(torch.from_numpy(packed.ids).to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()  # so that the clock tells the truth
        if deadline.over() or time.time() - begin > args.seconds:
            break
    return LatentSet(torch.cat(latents), torch.cat(ids))


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, [16] float32."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True, help="checkpoint of train_vae.py, or .safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--clips", type=int, default=16_384, help="at most")
    parser.add_argument("--seconds", type=float, default=90, help="compilation included")
    parser.add_argument("--deadline-seconds", type=float, help="when this process ends, everything included")
    parser.add_argument("--batch", type=int, default=16, help="clips at a time; less than 2^31 values in 48 channels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    deadline = Deadline(args.deadline_seconds, reserve=5)
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = channels_last(WanVae().to(device)).eval()
    vae.load_state_dict(averaged_weights(args.vae))
    vae.requires_grad_(False)
    begin = time.time()
    with ClipSource(args.vocabulary, args.workers) as source:
        data = encode_clips(vae, source, args, device, deadline)
    if len(data.latents) < LEAST and len(data.latents) < args.clips:
        print(f"latents: {len(data.latents)} clips are too few: all over again in the next run", flush=True)
        return UNFINISHED
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data.save(args.out)
    print(f"latents: {len(data.latents)} clips of {args.size}x{args.size}x{args.frames} in {time.time() - begin:.0f} s",
          flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
