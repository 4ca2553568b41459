"""Samples clips for captions of held-out scenes and lets the reader of tests/demo judge them.

    python evaluate.py --vocabulary ../tokenizer/spiece.model --vae /tmp/vae.pt --denoiser /tmp/dit.pt --count 256

Weights are rounded to bf16 first, as they are shipped.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from clips import ClipSource, save_sheet, to_bytes
from sample import Networks, sample
from tokenizer import Tokenizer
from train_transformer import Denoiser
from vae import WanVae, channels_last

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "demo"))
from reader import LABELS, Reader, clip_of  # noqa: E402

SEED = 902


def networks_of(vae_file: Path, denoiser_file: Path, device: torch.device) -> Networks:
    vae, denoiser = channels_last(WanVae()), Denoiser()
    for module, file in ((vae, vae_file), (denoiser, denoiser_file)):
        module.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["modules"]["average"])
        module.eval().requires_grad_(False)
        for p in module.parameters():
            p.data = p.data.bfloat16().float()
        module.to(device)
    return Networks(vae, denoiser.text, denoiser.transformer, denoiser.mean, denoiser.std)


def judge(clips: Tensor, wanted: list[dict[str, str]], captions: list[str], reader: Reader,
          right: dict[str, int]) -> None:
    """Adds to `right` what clips (uint8 [n, F, 3, H, W]) show as wanted; prints the others."""
    for clip, facts, caption in zip(clips, wanted, captions):
        found = reader.read(clip_of(clip.permute(0, 2, 3, 1).cpu().numpy()))
        misses = {name: found[name] for name in LABELS if found[name] != facts[name]}
        for name in LABELS:
            right[name] += name not in misses
        right["all"] += not misses
        if misses:
            print(f"  \"{caption}\" reads as {misses}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--denoiser", type=Path, required=True)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--prompts", nargs="*", help="draw these instead, on the sheet alone")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks, tokenizer, reader = networks_of(args.vae, args.denoiser, device), Tokenizer(args.vocabulary), Reader()
    shape = ((args.frames - 1) // 4 + 1, args.size // 8, args.size // 8)

    def draw(captions: list[str], seed: int) -> Tensor:
        ids = torch.tensor([tokenizer.encode(caption) for caption in captions], device=device)
        return to_bytes(sample(networks, ids, shape, args.steps, args.guidance, seed))

    if args.prompts:
        save_sheet(list(draw(args.prompts, 0)), args.sheet)
        return
    right, rows, begin = dict.fromkeys([*LABELS, "all"], 0), [], time.time()
    for i, packed in enumerate(ClipSource(args.vocabulary, 0).stream(SEED, args.count, args.frames, True, args.batch)):
        clips = draw(packed.captions, i)
        judge(clips, [s.attributes() for s in packed.scenes], packed.captions, reader, right)
        rows += list(clips[:12]) if not rows else []
    if args.sheet:
        save_sheet(rows, args.sheet)
    shares = {name: f"{100 * n / args.count:.1f} %" for name, n in right.items()}
    print(f"{args.size}x{args.size}x{args.frames}, {args.steps} steps, guidance {args.guidance}: {args.count} clips of "
          f"held-out captions in {time.time() - begin:.0f} s, right: {shares}")


if __name__ == "__main__":
    main()
