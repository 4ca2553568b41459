"""Trains the VAE on random crops of freshly rendered clips.

    python train_vae.py --vocabulary ../tokenizer/spiece.model --checkpoint vae.pt --total-minutes 8

L1 at three scales and L1 of differences along x, y and t keep edges and motion sharp without any
pretrained network; the KL term only keeps latents near unit size.  What moves is small and hard: it
weighs more, and half of the crops are drawn where things move.  Ends by --deadline-seconds, wherever
it is then (exit status 3), and goes on from the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clips import ClipSource, rendered, save_sheet, to_bytes, to_model
from export import save_weights
from forms import choose_forms
from training import UNFINISHED, Average, Checkpoint, Deadline, Muon, Schedule, adamw, averaged_weights, set_rate
from vae import WanVae, channels_last

KL_WEIGHT = 3e-4
MOVING_WEIGHT = 3.0  # of moving pixels, on top of everything's 1
VALIDATION_SEED = 900
PLACES = 8  # pixels between the places where a crop may be put for its motion


class CropPool:
    """Rendered clips in device memory, a part of them replaced now and then; hands out crops."""

    def __init__(self, source: ClipSource, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.next = args, device, 0
        self.batches = source.stream(args.seed, 10**6, 33, batch=args.pool // 8)
        clips, motion = zip(*(self._fresh() for _ in range(8)))
        self.clips, self.motion = torch.cat(clips), torch.cat(motion)

    def _fresh(self) -> tuple[Tensor, Tensor]:
        clips = rendered(next(self.batches), self.args.size, self.device)
        return clips, crop_motion(clips, self.args.crop).cpu()

    def refresh(self) -> None:
        part = self.clips.shape[0] // 8
        here = slice(self.next * part, (self.next + 1) * part)
        self.clips[here], self.motion[here] = self._fresh()
        self.next = (self.next + 1) % 8

    def _place(self, clip: int, crop: int) -> tuple[int, int]:
        """Top and left of a crop: anywhere, or more often where more moves."""
        if crop != self.args.crop or torch.rand(()) < 0.5:
            y, x = torch.randint(self.args.size - crop + 1, (2,)).tolist()
            return y, x
        motion = self.motion[clip]
        place = torch.multinomial(motion.flatten(), 1).item()
        return place // motion.shape[1] * PLACES, place % motion.shape[1] * PLACES

    def crops(self, batch: int, crop: int) -> Tensor:
        """[batch, 3, frames, crop, crop]; every crop has its own place and first frame."""
        frames = self.args.frames
        out = []
        for _ in range(batch):
            number = torch.randint(self.clips.shape[0], ()).item()
            f = torch.randint(self.clips.shape[1] - frames + 1, ()).item()
            y, x = self._place(number, crop)
            out.append(self.clips[number, f:f + frames, :, y:y + crop, x:x + crop])
        return to_model(torch.stack(out), torch.float32).contiguous(memory_format=torch.channels_last_3d)


def crop_motion(clips: Tensor, crop: int) -> Tensor:
    """uint8 [n, F, 3, H, W] -> how much moves in crops at (i, j) * PLACES, [n, rows, columns], never zero."""
    energy = torch.zeros(clips.shape[0], *clips.shape[3:], device=clips.device)
    for before, after in zip(clips[:, :-1].unbind(1), clips[:, 1:].unbind(1)):
        energy += (after.float() - before.float()).abs().mean(1)
    return F.avg_pool2d(energy[:, None], crop, PLACES)[:, 0] + 1e-3


def differences(x: Tensor) -> list[Tensor]:
    return [x.diff(dim=d) for d in (2, 3, 4)]


def emphasis(clip: Tensor) -> Tensor:
    """[B, 1, F, H, W]: 1, and 1 + MOVING_WEIGHT near what differs from the frame before or after."""
    change = clip.diff(dim=2).abs().amax(1, keepdim=True)
    change = torch.maximum(F.pad(change, (0, 0, 0, 0, 1, 0)), F.pad(change, (0, 0, 0, 0, 0, 1)))
    return 1 + MOVING_WEIGHT * (F.max_pool3d(change, (1, 5, 5), 1, (0, 2, 2)) > 0.1).float()


def loss(vae: nn.Module, clip: Tensor) -> tuple[Tensor, Tensor]:
    """(training loss, reconstruction's mean squared error)."""
    with torch.autocast(clip.device.type, torch.bfloat16):
        mean, log_variance = vae.encode(clip)
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        out = vae.decode(mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
    error = out.float() - clip
    weight = emphasis(clip)
    total = (weight * error.abs()).mean()
    for d, difference in zip((2, 3, 4), differences(error)):
        total = total + 0.5 * (weight.narrow(d, 1, weight.shape[d] - 1) * difference.abs()).mean()
    for scale in (2, 4):
        window = (1, scale, scale)
        total = total + 0.5 * (F.avg_pool3d(weight, window) * F.avg_pool3d(error, window).abs()).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return total + KL_WEIGHT * kl, error.detach().square().mean()


@torch.no_grad()
def validate(vae: WanVae, source: ClipSource, args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """PSNR in dB over whole clips of held-out scenes, and near what moves; writes a sheet of pairs when asked."""
    squares, moving, rows = [], [], []
    for packed in source.stream(VALIDATION_SEED, 16, 33, held_out=True, batch=4):
        clips = rendered(packed, args.size, device)
        x = to_model(clips, torch.float32)
        with torch.autocast(device.type, torch.bfloat16):
            out = to_bytes(vae.decode(vae.encode(x.contiguous(memory_format=torch.channels_last_3d))[0]))
        square = (out.float() - clips.float()).square().mean(2)
        near = emphasis(x)[:, 0] > 1
        squares.append(square.mean())
        moving.append((square * near).sum() / near.sum().clamp(min=1))
        rows += [clips[0], out[0]]
    if args.sheet:
        save_sheet(rows, args.sheet)
    both = [10 * torch.log10(255.0**2 / torch.stack(values).mean()).item() for values in (squares, moving)]
    return both[0], both[1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--total-minutes", type=float, default=8, help="of training, over all runs")
    parser.add_argument("--deadline-seconds", type=float, help="when this process ends, everything included")
    parser.add_argument("--start", type=Path, help="first weights: a checkpoint's averaged ones, or .safetensors")
    parser.add_argument("--ship", type=Path, help="model folder that gets averaged bf16 weights with each save")
    parser.add_argument("--decoder-only", action="store_true", help="leave latents as they are: a transformer knows them")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--whole-every", type=int, default=4, help="each n-th step sees one whole clip")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pool", type=int, default=256, help="clips in device memory")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sheet", type=Path)
    return parser.parse_args()


def optimizers_of(vae: WanVae, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions between the first and the last layers, AdamW for everything else."""
    trained = {n: p for n, p in vae.named_parameters() if p.requires_grad}
    inner = [p for n, p in trained.items() if ("resnets" in n or "down_blocks" in n) and p[0].numel() > 1]
    others = [p for p in trained.values() if all(p is not q for q in inner)]
    return [adamw(others, rate, 0.01, (0.9, 0.99)), Muon(inner, rate, 0.01)]


def train(args: argparse.Namespace, source: ClipSource, device: torch.device) -> int:
    deadline = Deadline(args.deadline_seconds, reserve=25)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    vae = channels_last(WanVae().to(device))
    if args.start:
        vae.load_state_dict(averaged_weights(args.start))
    if args.decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    average = Average(vae, 0.998)
    optimizers = optimizers_of(vae, args.rate)
    ship = (lambda: save_weights(average.module.state_dict(), args.ship / "vae")) if args.ship else None
    checkpoint = Checkpoint(args.checkpoint, {"vae": vae, "average": average.module}, optimizers, ship)
    checkpoint.load(device)
    step = average.steps = checkpoint.step
    args.seed += step  # other clips and crops than before
    torch.manual_seed(args.seed)
    pool = CropPool(source, args, device)
    schedule = Schedule(60 * args.total_minutes, checkpoint.seconds)
    if device.type == "cuda" and not schedule.over():
        print(f"vae: {choose_forms(vae, pool.crops(args.batch, args.crop))}", flush=True)
    objective = torch.compile(loss, dynamic=False) if args.compile else loss
    warm = step + 2 * args.whole_every
    while not schedule.over() and not deadline.over():
        set_rate(optimizers, schedule.rate(args.rate))
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
            torch.cuda.synchronize() if device.type == "cuda" else None
            schedule.begin()
        if step % 50 == 0:
            pool.refresh()
        if step % 500 == 1:
            psnr = 10 * torch.log10(4.0 / error).item()
            seconds = schedule.elapsed()
            print(f"vae step {step} {seconds:.0f} s loss {value.item():.4f} crop PSNR {psnr:.2f} dB", flush=True)
        checkpoint.save_if_due(step, schedule.elapsed())
    finished = schedule.over()
    checkpoint.save(step, schedule.elapsed())
    if deadline.asked_to_stop:
        return UNFINISHED
    psnr, moving = validate(average.module, source, args, device)
    print(f"vae: {step} steps in {schedule.elapsed():.0f} s, held-out PSNR {psnr:.2f} dB, of what moves {moving:.2f} dB",
          flush=True)
    return 0 if finished else UNFINISHED


if __name__ == "__main__":
    arguments = parse()
    with ClipSource(arguments.vocabulary, arguments.workers) as clip_source:
        status = train(arguments, clip_source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sys.exit(status)
