"""Samples clips for captions of held-out scenes and lets the reader of tests/demo judge them.

    python evaluate.py --vocabulary ../tokenizer/spiece.model --model .. --count 256

--model is an exported folder, so the weights are those that are shipped.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from clips import ClipSource, save_sheet, to_bytes
from export import load_denoiser
from sample import Networks, sample
from tokenizer import Tokenizer
from train_transformer import Denoiser
from training import UNFINISHED, Deadline, averaged_weights
from vae import WanVae, channels_last

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "demo"))
from reader import LABELS, Reader, clip_of  # noqa: E402

SEED = 902


def networks_of(model: Path, device: torch.device) -> Networks:
    vae, denoiser = channels_last(WanVae()), Denoiser()
    vae.load_state_dict(averaged_weights(model / "vae" / "diffusion_pytorch_model.safetensors"))
    denoiser.load_state_dict(load_denoiser(model))
    for module in (vae, denoiser):
        module.eval().requires_grad_(False).to(device)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--deadline-seconds", type=float, help="when this process ends, everything included")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--seen", action="store_true", help="captions of scenes that training may have seen")
    parser.add_argument("--prompts", nargs="*", help="draw these instead, on the sheet alone")
    args = parser.parse_args()
    deadline = Deadline(args.deadline_seconds, reserve=15)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks, tokenizer, reader = networks_of(args.model, device), Tokenizer(args.vocabulary), Reader()
    shape = ((args.frames - 1) // 4 + 1, args.size // 8, args.size // 8)

    def draw(captions: list[str], seed: int) -> Tensor:
        ids = torch.tensor([tokenizer.encode(caption) for caption in captions], device=device)
        return to_bytes(sample(networks, ids, shape, args.steps, args.guidance, seed))

    if args.prompts:
        save_sheet(list(draw(args.prompts, 0)), args.sheet)
        return 0
    right, rows, judged, begin = dict.fromkeys([*LABELS, "all"], 0), [], 0, time.time()
    source = ClipSource(args.vocabulary, 0)
    for i, packed in enumerate(source.stream(SEED, args.count, args.frames, not args.seen, args.batch)):
        if deadline.over():
            break
        clips = draw(packed.captions, i)
        judge(clips, [s.attributes() for s in packed.scenes], packed.captions, reader, right)
        judged += len(clips)
        if args.sheet and not rows:
            rows = list(clips[:12])
            save_sheet(rows, args.sheet)
            print(f"{args.sheet.name}, row by row:", *packed.captions[:12], sep="\n  ", flush=True)
    shares = "  ".join(f"{name} {100 * n / max(judged, 1):.1f} %" for name, n in right.items())
    print(f"{args.size}x{args.size}x{args.frames}, {args.steps} steps, guidance {args.guidance:g}: {judged} clips of "
          f"{'seen' if args.seen else 'held-out'} captions in {time.time() - begin:.0f} s, right: {shares}")
    return 0 if judged >= args.count else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
