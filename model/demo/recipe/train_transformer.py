"""Trains transformer and text encoder together, by flow matching on cached latents.

    python train_transformer.py --latents latents-256-33:48:4 latents-384-49:12:1 --checkpoint denoiser.pt

x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0, t = 1000 sigma; sigma is a logit-normal draw,
shifted as at sampling time.  One caption in ten is replaced by the empty one, for guidance.  Ends by
--deadline-seconds, wherever it is then (exit status 3), and goes on from the checkpoint; without
--total-minutes the schedule is what the deadline leaves.  Sets of latents (latents.py) of several sizes take
turns, and grow while others still encode.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from export import load_denoiser, save_denoiser
from latents import LatentSet, statistics
from sample import shifted
from text_encoder import TextConfig, TextEncoder
from training import UNFINISHED, Average, Checkpoint, Deadline, Muon, Schedule, adamw, set_rate
from transformer import Rope, WanTransformer

DROP_TEXT = 0.1
TEXT_SHARE = 0.1  # of the rate: the text encoder has been taught before (train_text.py) and only adapts


class Denoiser(nn.Module):
    """Text encoder and transformer in one, as they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(TextConfig())
        self.transformer = WanTransformer()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("std", torch.ones(16))

    def loss(self, latents: Tensor, ids: Tensor, rope: Rope) -> Tensor:
        """latents [B, 16, f, h, w] as encoded, ids [B, tokens]; neighbours are twins and share noise and time, so that
        what differs between them is what their captions say."""
        b = latents.shape[0]
        pairs = -(-b // 2)
        x0 = (latents.float() - self.mean.view(1, -1, 1, 1, 1)) / self.std.view(1, -1, 1, 1, 1)
        empty = F.pad(torch.ones_like(ids[:, :1]), (0, ids.shape[1] - 1))
        ids = torch.where(torch.rand(b, 1, device=ids.device) < DROP_TEXT, empty, ids)
        sigma = shifted(torch.sigmoid(torch.randn(pairs, device=ids.device))).repeat_interleave(2)[:b]
        noise = torch.randn_like(x0[:pairs]).repeat_interleave(2, 0)[:b]
        mix = sigma.view(-1, 1, 1, 1, 1)
        mask = (ids > 0).float()
        with torch.autocast(ids.device.type, torch.bfloat16):
            velocity = self.transformer((1 - mix) * x0 + mix * noise, 1000 * sigma, self.text(ids, mask), mask, rope)
        return F.mse_loss(velocity.float(), noise - x0)


@dataclass(frozen=True)
class SetPlan:
    """A folder of latents, how many make a batch, and how many steps it gets before the next set's turn."""

    folder: Path
    batch: int
    turns: int

    @classmethod
    def parse(cls, text: str) -> SetPlan:
        folder, batch, turns = text.rsplit(":", 2)
        return cls(Path(folder), int(batch), int(turns))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=SetPlan.parse, nargs="+", required=True, help="FOLDER:BATCH:TURNS")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--total-minutes", type=float, help="of training, over all runs; else until the deadline")
    parser.add_argument("--deadline-seconds", type=float, help="when this process ends, everything included")
    parser.add_argument("--start", type=Path, help="model folder with first weights")
    parser.add_argument("--text", type=Path, help="the text encoder's first weights (train_text.py)")
    parser.add_argument("--ship", type=Path, help="model folder that gets averaged bf16 weights with each save")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def optimizers_of(denoiser: Denoiser, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    inner = {p for n, p in denoiser.transformer.blocks.named_parameters() if p.dim() == 2} if args.muon else set()
    text = list(denoiser.text.parameters())
    others = [p for n, p in denoiser.named_parameters() if p not in inner and not n.startswith("text.")]
    matrices = [p for p in denoiser.transformer.blocks.parameters() if p in inner]
    found: list[torch.optim.Optimizer] = [adamw(others, args.rate, 0.01, (0.9, 0.98)),
                                          adamw(text, args.rate, 0.0, (0.9, 0.98), TEXT_SHARE)]
    return found + [Muon(matrices, args.rate, 0.02)] if matrices else found


def first_weights(denoiser: Denoiser, args: argparse.Namespace, latents: Tensor) -> None:
    if args.start:
        denoiser.load_state_dict(load_denoiser(args.start))
    if args.text:
        denoiser.text.load_state_dict(load_file(args.text))
    if args.start:
        return
    for name, value in zip(("mean", "std"), statistics(latents[:2048])):
        getattr(denoiser, name).copy_(value)


def first_sets(plans: list[SetPlan], deadline: Deadline, device: torch.device) -> list[LatentSet] | None:
    """What has been encoded so far, once there is some of each size; None when that never happens."""
    while not deadline.over():
        found = [LatentSet.load(plan.folder, device) for plan in plans]
        if all(found):
            return found
        time.sleep(0.5)
    return None


def run(args: argparse.Namespace, device: torch.device) -> int:
    if args.total_minutes is None and args.deadline_seconds is None:
        raise SystemExit("either --total-minutes or --deadline-seconds has to say how long")
    deadline = Deadline(args.deadline_seconds, reserve=5)
    torch.manual_seed(args.seed)
    sets = first_sets(args.latents, deadline, device)
    if sets is None:
        return UNFINISHED
    denoiser = Denoiser().to(device)
    first_weights(denoiser, args, sets[0].latents)
    average = Average(denoiser, 0.9995)
    optimizers = optimizers_of(denoiser, args)
    ship = (lambda: save_denoiser(average.module.state_dict(), args.ship)) if args.ship else None
    checkpoint = Checkpoint(args.checkpoint, {"denoiser": denoiser, "average": average.module}, optimizers, ship)
    checkpoint.load(device)
    step = average.steps = checkpoint.step
    torch.manual_seed(args.seed + step)
    ropes = [denoiser.transformer.rope(data.latents[:1]) for data in sets]
    turns = [i for i, plan in enumerate(args.latents) for _ in range(plan.turns)]

    objective = torch.compile(denoiser.loss, dynamic=False) if args.compile else denoiser.loss
    schedule = Schedule(60 * args.total_minutes if args.total_minutes else checkpoint.seconds + deadline.left(),
                        checkpoint.seconds)
    warm, shown, totals = step + 2 * len(turns), step, torch.zeros(len(sets), device=device)
    while not schedule.over() and not deadline.over():
        set_rate(optimizers, schedule.rate(args.rate))
        chosen = turns[step % len(turns)]
        value = objective(*sets[chosen].batch(args.latents[chosen].batch), ropes[chosen])
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
            schedule.begin()
            if args.total_minutes is None:
                schedule.total = schedule.spent + deadline.left() - deadline.reserve - 1
        if step % 16 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # the clock must not run ahead of the device
        if step % 100 == 0:
            for data in sets:
                data.refresh()
        if step % 500 == 0:
            means = " ".join(f"{v:.4f}" for v in (totals / (step - shown)).tolist())
            print(f"transformer step {step} {schedule.elapsed():.0f} s of {schedule.total:.0f} loss {means}, clips "
                  f"{[len(data) for data in sets]}", flush=True)
            shown, totals = step, torch.zeros(len(sets), device=device)
        checkpoint.save_if_due(step, schedule.elapsed())
    checkpoint.save(step, schedule.elapsed())
    print(f"transformer: {step} steps in {schedule.elapsed():.0f} s, loss since step {shown} "
          f"{(totals / max(step - shown, 1)).tolist()}", flush=True)
    return 0 if schedule.over() else UNFINISHED


if __name__ == "__main__":
    arguments = parse()
    torch.backends.cuda.matmul.allow_tf32 = True
    sys.exit(run(arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
