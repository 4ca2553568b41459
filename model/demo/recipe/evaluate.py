"""How often clips drawn for unseen captions show what they should, by the reader of tests/demo.

    python evaluate.py --vocabulary ../tokenizer/spiece.model --vae /tmp/vae.pt --denoiser /tmp/dit.pt --clips 128
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from clips import ClipSource, save_sheet, to_bytes
from sample import Networks, sample
from train_reader import LABELS, frames_of
from train_transformer import Denoiser
from vae import WanVae
from reader import Reader

EVALUATION_SEED = 904


def networks(vae_file: Path, denoiser_file: Path, device: torch.device) -> Networks:
    vae, denoiser = WanVae(), Denoiser()
    for module, file in ((vae, vae_file), (denoiser, denoiser_file)):
        module.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["modules"]["average"])
        module.to(device).eval()
    return Networks(vae, denoiser.text, denoiser.transformer, denoiser.mean, denoiser.std)


def evaluate(args: argparse.Namespace, source: ClipSource, device: torch.device) -> dict:
    nets, reader = networks(args.vae, args.denoiser, device), Reader()
    shape = ((args.frames - 1) // 4 + 1, args.size // 8, args.size // 8)
    right, rows, wrong = dict.fromkeys(LABELS, 0), [], []
    for packed in source.stream(EVALUATION_SEED, args.clips, args.frames, held_out=True, batch=32):
        clips = to_bytes(sample(nets, packed.ids[:, 0].to(device), shape, guidance=args.guidance))
        rows += list(clips[:2].cpu())
        for scene, text, clip in zip(packed.scenes, packed.captions, frames_of(clips).cpu().numpy()):
            found = reader.read(clip)
            misses = {name: found[name] for name in LABELS if found[name] != getattr(scene, name)}
            for name in LABELS:
                right[name] += name not in misses
            if misses:
                wrong.append([text, misses])
    if args.sheet:
        save_sheet(rows[:10], args.sheet)
    return {"clips": args.clips, "right": {k: v / args.clips for k, v in right.items()}, "wrong": wrong[:12]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--denoiser", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    with ClipSource(arguments.vocabulary, arguments.workers) as clip_source:
        device_used = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(evaluate(arguments, clip_source, device_used)), flush=True)
