"""Trains transformer and text encoder together, by flow matching on cached latents.

    python train_transformer.py --vae /tmp/vae.pt --checkpoint /tmp/dit.pt --minutes 9 --total-minutes 18

x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0, t = 1000 sigma; sigma is a logit-normal draw,
shifted as at sampling time.  One caption in ten is replaced by the empty one, for guidance.  Stops by
the clock and goes on from the checkpoint, also with clips of another size (--size, --frames).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clips import ClipSource, save_sheet, to_bytes
from latents import LatentSet, encode_clips, statistics
from sample import Networks, sample, shifted
from text_encoder import TextConfig, TextEncoder
from training import Average, Budget, load, optimizer, save
from transformer import WanTransformer
from vae import WanVae

DROP_TEXT = 0.1
SHEET_SEED = 901
FRESH_SEED = 7_000_000


class Denoiser(nn.Module):
    """Text encoder and transformer in one, as they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(TextConfig())
        self.transformer = WanTransformer()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("std", torch.ones(16))

    def loss(self, latents: Tensor, ids: Tensor) -> Tensor:
        """latents [B, 16, f, h, w] as encoded, ids [B, tokens]."""
        b = latents.shape[0]
        x0 = (latents.float() - self.mean.view(1, -1, 1, 1, 1)) / self.std.view(1, -1, 1, 1, 1)
        empty = F.pad(torch.ones_like(ids[:, :1]), (0, ids.shape[1] - 1))
        ids = torch.where(torch.rand(b, 1, device=ids.device) < DROP_TEXT, empty, ids)
        sigma = shifted(torch.sigmoid(torch.randn(b, device=ids.device)))
        noise = torch.randn_like(x0)
        mix = sigma.view(-1, 1, 1, 1, 1)
        mask = (ids > 0).float()
        with torch.autocast(ids.device.type, torch.bfloat16):
            velocity = self.transformer((1 - mix) * x0 + mix * noise, 1000 * sigma, self.text(ids, mask), mask)
        return F.mse_loss(velocity.float(), noise - x0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True, help="checkpoint of train_vae.py")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9, help="of this run, encoding aside")
    parser.add_argument("--total-minutes", type=float, default=18, help="of the whole schedule")
    parser.add_argument("--cache", type=Path, help="latents from an earlier run, if the file is there")
    parser.add_argument("--clips", type=int, default=16_384)
    parser.add_argument("--fresh-every", type=int, default=0, help="steps between 256 new clips; 0: never")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sheet", type=Path)
    return parser.parse_args()


def load_latents(args: argparse.Namespace, vae: WanVae, source: ClipSource, device: torch.device) -> LatentSet:
    if args.cache and args.cache.exists():
        stored = torch.load(args.cache, map_location=device, weights_only=True)
        return LatentSet(stored["latents"], stored["ids"])
    latents = encode_clips(vae, source, args.seed, args.clips, args.frames, args.size, device)
    if args.cache:
        torch.save({"latents": latents.latents, "ids": latents.ids}, args.cache)
    return latents


def draw_sheet(average: Denoiser, vae: WanVae, source: ClipSource, args: argparse.Namespace,
               device: torch.device) -> None:
    packed = next(source.stream(SHEET_SEED, 12, args.frames, held_out=True))
    networks = Networks(vae, average.text, average.transformer, average.mean, average.std)
    shape = ((args.frames - 1) // 4 + 1, args.size // 8, args.size // 8)
    clips = to_bytes(sample(networks, packed.ids[:, 0].to(device), shape))
    save_sheet(list(clips), args.sheet)
    args.sheet.with_suffix(".txt").write_text("\n".join(packed.captions) + "\n")


def run(args: argparse.Namespace, source: ClipSource, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    vae = WanVae().to(device)
    vae.load_state_dict(torch.load(args.vae, map_location=device, weights_only=True)["modules"]["average"])
    vae.eval().requires_grad_(False)
    denoiser = Denoiser().to(device)
    average = Average(denoiser, 0.9995)
    opt = optimizer(denoiser, args.rate, 0.01, (0.9, 0.98))
    modules = {"denoiser": denoiser, "average": average.module}
    begun = args.checkpoint.exists()
    facts = load(args.checkpoint, modules, opt, device) if begun else {"step": 0, "seconds": 0.0}
    step, average.steps = facts["step"], facts["step"]
    data = load_latents(args, vae, source, device)
    if not begun:
        for module in (denoiser, average.module):
            for name, value in zip(("mean", "std"), statistics(data.latents[:2048])):
                getattr(module, name).copy_(value)
    print(f"latents {tuple(data.latents.shape)} mean {denoiser.mean.tolist()} std {denoiser.std.tolist()}", flush=True)

    objective = torch.compile(denoiser.loss) if args.compile else denoiser.loss
    budget = Budget(args.minutes, args.total_minutes, facts["seconds"])
    warm, shown, total = step + 5, step, torch.zeros((), device=device)
    while not budget.over():
        for group in opt.param_groups:
            group["lr"] = budget.rate(args.rate)
        value = objective(*data.batch(args.batch))
        value.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        average.update(denoiser)
        total += value.detach()
        step += 1
        if step == warm:
            budget.restart()
        if args.fresh_every and step % args.fresh_every == 0:
            data.append(encode_clips(vae, source, FRESH_SEED + step, 256, args.frames, args.size, device))
        if step % 500 == 0:
            print(f"dit step {step} {budget.elapsed():.0f} s loss {(total / (step - shown)).item():.4f}", flush=True)
            shown, total = step, torch.zeros((), device=device)
    save(args.checkpoint, modules, opt, step=step, seconds=budget.elapsed())
    print(f"dit done: step {step}, {budget.elapsed():.0f} s", flush=True)
    if args.sheet:
        draw_sheet(average.module, vae, source, args, device)


if __name__ == "__main__":
    arguments = parse()
    with ClipSource(arguments.vocabulary, arguments.workers) as clip_source:
        run(arguments, clip_source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
