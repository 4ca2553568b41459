"""Clips encoded once: latents and tokenised captions.

    python latents.py --vocabulary ../tokenizer/spiece.model --vae vae.pt --out latents-256-33 --size 256 --frames 33

Makes as many clips as --seconds allow, --clips at most.  --out is a folder that gets them in parts, SEED-NNN.pt, as
they come: a training may begin with the first part, and encoders with other seeds may add to the same folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Thread

import torch
from torch import Tensor

from clips import ClipSource, rendered, to_model
from forms import choose_forms
from training import UNFINISHED, Deadline, averaged_weights
from vae import WanVae, channels_last

LEAST = 64  # clips; fewer make no set
LEAST_PART = 4  # clips of the first part
PART_SECONDS = 8.0


@dataclass
class LatentSet:
    """latents [N, 16, f, h, w] bf16, not yet normalised; ids [N, captions, tokens] int64."""

    latents: Tensor
    ids: Tensor
    folder: Path
    parts: set[Path]  # that are in here
    coming: Queue = field(default_factory=Queue)  # parts that a thread has read

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents [size, ...] and one caption each [size, tokens]; twins (see scenes.py) side by side."""
        pairs = -(-size // 2)
        pick = 2 * torch.randint(len(self) // 2, (pairs,), device=self.latents.device)
        pick = torch.stack([pick, pick + 1], 1).flatten()[:size]
        which = torch.randint(self.ids.shape[1], (pairs,), device=self.ids.device).repeat_interleave(2)[:size]
        return self.latents[pick], self.ids[pick, which]

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> LatentSet | None:
        """All parts that are there; None while there is none."""
        parts = sorted(folder.glob("*.pt"))
        if not parts:
            return None
        stored = [torch.load(part, map_location=device, weights_only=True) for part in parts]
        found = cls(*(torch.cat([one[name] for one in stored]) for name in ("latents", "ids")), folder, set(parts))
        Thread(target=found._read, daemon=True).start()
        return found

    def _read(self) -> None:
        """Reads the parts that come, beside the training."""
        while True:
            for part in sorted(set(self.folder.glob("*.pt")) - self.parts):
                self.coming.put(torch.load(part, map_location=self.latents.device, weights_only=True))
                self.parts.add(part)
            time.sleep(1)

    def refresh(self) -> None:
        """Adds what has been read since."""
        new = [self.coming.get() for _ in range(self.coming.qsize())]
        if new:
            self.latents = torch.cat([self.latents, *(one["latents"] for one in new)])
            self.ids = torch.cat([self.ids, *(one["ids"] for one in new)])


class PartWriter:
    """Collects clips and writes a part every PART_SECONDS, each whole or not there."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.written, self.clips = folder, seed, 0, 0
        self.latents: list[Tensor] = []
        self.ids: list[Tensor] = []
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{seed}-*"):
            old.unlink()
        self.since = 0.0  # so that the first clips are a part of their own, for whoever waits for their size

    def add(self, latents: Tensor, ids: Tensor) -> None:
        self.latents.append(latents.cpu())
        self.ids.append(ids)
        self.clips += len(latents)
        if time.time() - self.since > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.latents:
            file = self.folder / f"{self.seed}-{self.written:03d}.pt"
            part = file.with_suffix(".tmp")
            torch.save({"latents": torch.cat(self.latents), "ids": torch.cat(self.ids)}, part)
            part.replace(file)
            self.written, self.latents, self.ids = self.written + 1, [], []
        self.since = time.time()


@torch.no_grad()
def encode_clips(vae: WanVae, source: ClipSource, args: argparse.Namespace, device: torch.device,
                 deadline: Deadline) -> int:
    """Renders and encodes clips, their means, until there are enough or the time is up; how many it made."""
    writer, begin = PartWriter(args.out, args.seed), time.time()
    encode = torch.compile(vae.encode, dynamic=False) if args.compile else vae.encode
    for packed in source.stream(args.seed + args.frames, args.clips, args.frames, batch=args.batch, twins=True):
        clips = to_model(rendered(packed, args.size, device)).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, torch.bfloat16):
            if not writer.clips and device.type == "cuda":
                writer.add(vae.encode(clips[:LEAST_PART])[0].bfloat16(), torch.from_numpy(packed.ids[:LEAST_PART]))
                print(f"latents: {choose_forms(vae, clips, backward=False)}", flush=True)
                continue
            latents = encode(clips)[0].bfloat16()
        writer.add(latents, torch.from_numpy(packed.ids))
        if deadline.over() or time.time() - begin > args.seconds:
            break
    writer.flush()
    return writer.clips


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, [16] float32."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True, help="checkpoint of train_vae.py, or .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder of parts")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--clips", type=int, default=16_384, help="at most")
    parser.add_argument("--seconds", type=float, default=90, help="compilation included")
    parser.add_argument("--deadline-seconds", type=float, help="when this process ends, everything included")
    parser.add_argument("--batch", type=int, default=16, help="clips at a time; less than 2^31 values in 48 channels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
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
        count = encode_clips(vae, source, args, device, deadline)
    if count < min(LEAST, args.clips):
        print(f"latents: {count} clips are too few: all over again in the next run", flush=True)
        return UNFINISHED
    print(f"latents: {count} clips of {args.size}x{args.size}x{args.frames} in {time.time() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
