"""Trains transformer and text encoder together, by flow matching on cached latents.

    python train_transformer.py --vae /tmp/vae.pt --checkpoint /tmp/dit.pt --minutes 9 --total-minutes 18

x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0, t = 1000 sigma; sigma is a logit-normal draw,
shifted as at sampling time.  One caption in ten is replaced by the empty one, for guidance.  Stops by
the clock and goes on from the checkpoint.  --sets takes turns between clips of several sizes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clips import ClipSource, save_sheet, to_bytes
from latents import LatentSet, encode_clips, statistics
from sample import Networks, sample, shifted
from text_encoder import TextConfig, TextEncoder
from training import Average, Budget, Muon, adamw, load, save, set_rate
from transformer import Rope, WanTransformer
from vae import WanVae, channels_last

DROP_TEXT = 0.1
SHEET_SEED = 901


class Denoiser(nn.Module):
    """Text encoder and transformer in one, as they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(TextConfig())
        self.transformer = WanTransformer()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("std", torch.ones(16))

    def loss(self, latents: Tensor, ids: Tensor, rope: Rope) -> Tensor:
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
            velocity = self.transformer((1 - mix) * x0 + mix * noise, 1000 * sigma, self.text(ids, mask), mask, rope)
        return F.mse_loss(velocity.float(), noise - x0)


@dataclass(frozen=True)
class SetPlan:
    """Clips of one size, and how many make a batch.  Written SIZExFRAMESxCLIPSxBATCH."""

    size: int
    frames: int
    clips: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> SetPlan:
        return cls(*map(int, text.split("x")))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True, help="checkpoint of train_vae.py")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9, help="of this run, encoding and compiling aside")
    parser.add_argument("--total-minutes", type=float, default=18, help="of the whole schedule")
    parser.add_argument("--cache", type=Path, required=True, help="folder for latents, kept from run to run")
    parser.add_argument("--sets", type=SetPlan.parse, nargs="+", default=[SetPlan(256, 33, 16_384, 64)])
    parser.add_argument("--turns", type=int, nargs="+", help="steps each set gets before the next; default: 1")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sheet", type=Path)
    return parser.parse_args()


def load_latents(plan: SetPlan, args: argparse.Namespace, vae: WanVae, source: ClipSource,
                 device: torch.device) -> LatentSet:
    file = args.cache / f"latents-{plan.size}-{plan.frames}-{plan.clips}.pt"
    if file.exists():
        stored = torch.load(file, map_location=device, weights_only=True)
        return LatentSet(stored["latents"], stored["ids"])
    begin = time.time()
    data = encode_clips(vae, source, args.seed + plan.frames, plan.clips, plan.frames, plan.size, device)
    print(f"encoded {tuple(data.latents.shape)} in {time.time() - begin:.0f} s", flush=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.save({"latents": data.latents, "ids": data.ids}, file)
    return data


def draw_sheet(average: Denoiser, vae: WanVae, source: ClipSource, plan: SetPlan, args: argparse.Namespace,
               device: torch.device) -> None:
    packed = next(source.stream(SHEET_SEED, 12, plan.frames, held_out=True))
    networks = Networks(vae, average.text, average.transformer, average.mean, average.std)
    shape = ((plan.frames - 1) // 4 + 1, plan.size // 8, plan.size // 8)
    clips = to_bytes(sample(networks, torch.from_numpy(packed.ids[:, 0]).to(device), shape))
    save_sheet(list(clips), args.sheet)
    args.sheet.with_suffix(".txt").write_text("\n".join(packed.captions) + "\n")


def optimizers_of(denoiser: Denoiser, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    inner = {p for n, p in denoiser.transformer.blocks.named_parameters() if p.dim() == 2} if args.muon else set()
    others = [p for p in denoiser.parameters() if p not in inner]
    matrices = [p for p in denoiser.transformer.blocks.parameters() if p in inner]
    found: list[torch.optim.Optimizer] = [adamw(others, args.rate, 0.01, (0.9, 0.98))]
    return found + [Muon(matrices, args.rate, 0.02)] if matrices else found


def run(args: argparse.Namespace, source: ClipSource, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    vae = channels_last(WanVae().to(device))
    vae.load_state_dict(torch.load(args.vae, map_location=device, weights_only=True)["modules"]["average"])
    vae.eval().requires_grad_(False)
    denoiser = Denoiser().to(device)
    average = Average(denoiser, 0.9995)
    optimizers = optimizers_of(denoiser, args)
    modules = {"denoiser": denoiser, "average": average.module}
    begun = args.checkpoint.exists()
    facts = load(args.checkpoint, modules, optimizers, device) if begun else {"step": 0, "seconds": 0.0}
    step, average.steps = facts["step"], facts["step"]
    torch.manual_seed(args.seed + step)
    sets = [load_latents(plan, args, vae, source, device) for plan in args.sets]
    if not begun:
        for module in (denoiser, average.module):
            for name, value in zip(("mean", "std"), statistics(sets[0].latents[:2048])):
                getattr(module, name).copy_(value)
    ropes = [denoiser.transformer.rope(data.latents[:1]) for data in sets]
    turns = [i for i, n in enumerate(args.turns or [1] * len(sets)) for _ in range(n)]

    objective = torch.compile(denoiser.loss, dynamic=False) if args.compile else denoiser.loss
    budget = Budget(args.minutes, args.total_minutes, facts["seconds"])
    warm, shown, totals = step + 2 * len(turns), step, torch.zeros(len(sets), device=device)
    while not budget.over():
        set_rate(optimizers, budget.rate(args.rate))
        chosen = turns[step % len(turns)]
        value = objective(*sets[chosen].batch(args.sets[chosen].batch), ropes[chosen])
        value.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        average.update(denoiser)
        totals[chosen] += value.detach() * len(turns) / turns.count(chosen)
        step += 1
        if step == warm:
            torch.cuda.synchronize() if device.type == "cuda" else None
            budget.restart()
        if step % 500 == 0:
            means = " ".join(f"{v:.4f}" for v in (totals / (step - shown)).tolist())
            print(f"dit step {step} {budget.elapsed():.0f} s loss {means}", flush=True)
            shown, totals = step, torch.zeros(len(sets), device=device)
    save(args.checkpoint, modules, optimizers, step=step, seconds=budget.elapsed())
    print(f"dit done: step {step}, {budget.elapsed():.0f} s", flush=True)
    if args.sheet:
        draw_sheet(average.module, vae, source, args.sets[0], args, device)


if __name__ == "__main__":
    arguments = parse()
    torch.backends.cuda.matmul.allow_tf32 = True
    with ClipSource(arguments.vocabulary, arguments.workers) as clip_source:
        run(arguments, clip_source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
