"""Trains the VAE on random crops of freshly rendered clips.

    python train_vae.py --vocabulary ../tokenizer/spiece.model --checkpoint /tmp/vae.pt --minutes 8 --total-minutes 8

L1 at three scales and L1 of differences along x, y and t keep edges and motion sharp without any
pretrained network; the KL term only keeps latents near unit size.  Stops by the clock and goes on
from the checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clips import ClipSource, rendered, save_sheet, to_bytes, to_model
from training import Average, Budget, Muon, adamw, load, save, set_rate
from vae import WanVae, channels_last

KL_WEIGHT = 3e-4
VALIDATION_SEED = 900


class CropPool:
    """Rendered clips in device memory, a part of them replaced now and then; hands out crops."""

    def __init__(self, source: ClipSource, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.next = args, device, 0
        self.batches = source.stream(args.seed, 10**6, 33, batch=args.pool // 8)
        self.clips = torch.cat([self._fresh() for _ in range(8)])

    def _fresh(self) -> Tensor:
        return rendered(next(self.batches), self.args.size, self.device)

    def refresh(self) -> None:
        part = self.clips.shape[0] // 8
        self.clips[self.next * part:(self.next + 1) * part] = self._fresh()
        self.next = (self.next + 1) % 8

    def crops(self, batch: int, crop: int) -> Tensor:
        """[batch, 3, frames, crop, crop]; every crop starts at its own place and frame."""
        frames = self.args.frames
        out = []
        for _ in range(batch):
            clip = self.clips[torch.randint(self.clips.shape[0], ()).item()]
            f = torch.randint(clip.shape[0] - frames + 1, ()).item()
            y, x = (torch.randint(self.args.size - crop + 1, ()).item() for _ in range(2))
            out.append(clip[f:f + frames, :, y:y + crop, x:x + crop])
        return to_model(torch.stack(out), torch.float32).contiguous(memory_format=torch.channels_last_3d)


def differences(x: Tensor) -> list[Tensor]:
    return [x.diff(dim=d) for d in (2, 3, 4)]


def loss(vae: nn.Module, clip: Tensor) -> tuple[Tensor, Tensor]:
    """(training loss, reconstruction's mean squared error)."""
    with torch.autocast(clip.device.type, torch.bfloat16):
        mean, log_variance = vae.encode(clip)
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        out = vae.decode(mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
    out = out.float()
    total = F.l1_loss(out, clip)
    total = total + 0.5 * sum(F.l1_loss(a, b) for a, b in zip(differences(out), differences(clip)))
    for scale in (2, 4):
        total = total + 0.5 * F.l1_loss(F.avg_pool3d(out, (1, scale, scale)), F.avg_pool3d(clip, (1, scale, scale)))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return total + KL_WEIGHT * kl, F.mse_loss(out.detach(), clip)


@torch.no_grad()
def validate(vae: WanVae, source: ClipSource, args: argparse.Namespace, device: torch.device) -> float:
    """PSNR in dB over whole clips of held-out scenes; writes a sheet of pairs when asked."""
    squares, rows = [], []
    for packed in source.stream(VALIDATION_SEED, 16, 33, held_out=True, batch=4):
        clips = rendered(packed, args.size, device)
        with torch.autocast(device.type, torch.bfloat16):
            out = to_bytes(vae.decode(vae.encode(to_model(clips, torch.float32))[0]))
        squares.append((out.float() - clips.float()).square().mean())
        rows += [clips[0], out[0]]
    if args.sheet:
        save_sheet(rows, args.sheet)
    return (10 * torch.log10(255.0**2 / torch.stack(squares).mean())).item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8, help="of this run")
    parser.add_argument("--total-minutes", type=float, default=8, help="of the whole schedule, earlier runs included")
    parser.add_argument("--start", type=Path, help="checkpoint whose averaged weights are the first ones")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--whole-every", type=int, default=4, help="each n-th step sees one whole clip")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pool", type=int, default=256, help="clips in device memory")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sheet", type=Path)
    return parser.parse_args()


def optimizers_of(vae: WanVae, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions between the first and the last layers, AdamW for everything else."""
    inner = [p for n, p in vae.named_parameters() if ("resnets" in n or "down_blocks" in n) and p[0].numel() > 1]
    others = [p for p in vae.parameters() if all(p is not q for q in inner)]
    return [adamw(others, rate, 0.01, (0.9, 0.99)), Muon(inner, rate, 0.01)]


def train(args: argparse.Namespace, source: ClipSource, device: torch.device) -> None:
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    vae = channels_last(WanVae().to(device))
    average = Average(vae, 0.999)
    if args.start:
        vae.load_state_dict(torch.load(args.start, map_location=device, weights_only=True)["modules"]["average"])
        average.module.load_state_dict(vae.state_dict())
    optimizers = optimizers_of(vae, args.rate)
    modules = {"vae": vae, "average": average.module}
    facts = load(args.checkpoint, modules, optimizers, device) if args.checkpoint.exists() else {"step": 0, "seconds": 0.0}
    step, average.steps = facts["step"], facts["step"]
    args.seed += step  # other clips and crops than before
    torch.manual_seed(args.seed)
    pool = CropPool(source, args, device)
    objective = torch.compile(loss, dynamic=False) if args.compile else loss
    budget = Budget(args.minutes, args.total_minutes, facts["seconds"])
    warm = step + 2 * args.whole_every
    while not budget.over():
        set_rate(optimizers, budget.rate(args.rate))
        whole = step % args.whole_every == 0
        value, error = objective(vae, pool.crops(1, args.size) if whole else pool.crops(args.batch, args.crop))
        value.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        average.update(vae)
        step += 1
        if step == warm:
            budget.restart()
        if step % 50 == 0:
            pool.refresh()
        if step % 500 == 1:
            psnr = 10 * torch.log10(4.0 / error)
            print(f"vae step {step} {budget.elapsed():.0f} s loss {value.item():.4f} crop PSNR {psnr:.2f} dB", flush=True)
    save(args.checkpoint, modules, optimizers, step=step, seconds=budget.elapsed())
    psnr = validate(average.module, source, args, device)
    print(f"vae done: step {step}, {budget.elapsed():.0f} s, held-out PSNR {psnr:.2f} dB", flush=True)


if __name__ == "__main__":
    arguments = parse()
    with ClipSource(arguments.vocabulary, arguments.workers) as clip_source:
        train(arguments, clip_source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
