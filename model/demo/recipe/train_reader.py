"""Trains the reader of tests/demo on rendered clips, so that generated ones can be judged.

    python train_reader.py --vocabulary ../tokenizer/spiece.model --out ../../../tests/demo/reader.npz --minutes 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clips import ClipSource, Packed, rendered

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "demo"))
from reader import FRAMES, LABELS, SIDE  # noqa: E402
from training import Deadline, Schedule  # noqa: E402

WIDTHS = (3 * FRAMES, 48, 64, 80, 80)
RENDER_SIDE = 2 * SIDE


class ReaderNet(nn.Module):
    """The network that tests/demo/reader.py evaluates in numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(WIDTHS[:-1], WIDTHS[1:]))
        features = WIDTHS[-1] * (SIDE // 16) ** 2
        self.head = nn.ModuleDict({name: nn.Linear(features, len(values)) for name, values in LABELS.items()})

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """clips [B, FRAMES, 3, SIDE, SIDE] in [0, 1] -> logits per attribute."""
        x = clips.flatten(1, 2) * 2 - 1
        for conv in self.conv:
            x = F.relu(conv(x))
        x = F.dropout(x.flatten(1), 0.1, self.training)
        return {name: head(x) for name, head in self.head.items()}


def frames_of(clips: Tensor) -> Tensor:
    """uint8 [B, F, 3, H, W] -> [B, FRAMES, 3, SIDE, SIDE] in [0, 1]."""
    picks = torch.linspace(0, clips.shape[1] - 1, FRAMES).round().long()
    x = clips[:, picks].float().flatten(0, 1) / 255
    return F.interpolate(x, size=(SIDE, SIDE), mode="area").unflatten(0, (-1, FRAMES))


def labels_of(packed: Packed, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.tensor([values.index(getattr(s, name)) for s in packed.scenes], device=device)
            for name, values in LABELS.items()}


def disturbed(x: Tensor) -> Tensor:
    """Brightness, contrast, blur and noise, as a codec or a model may add them."""
    b = x.shape[0]
    gain = 1 + 0.1 * torch.randn(b, 1, 1, 1, 1, device=x.device)
    shift = 0.04 * torch.randn(b, 1, 3, 1, 1, device=x.device)
    blurred = F.avg_pool2d(F.pad(x.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(x)
    mix = torch.rand(b, 1, 1, 1, 1, device=x.device)
    noise = 0.04 * torch.rand(b, 1, 1, 1, 1, device=x.device) * torch.randn_like(x)
    return ((x + mix * (blurred - x)) * gain + shift + noise).clamp(0, 1)


@torch.no_grad()
def accuracy(net: ReaderNet, source: ClipSource, device: torch.device, count: int = 512) -> dict[str, float]:
    net.eval()
    right = dict.fromkeys(LABELS, 0)
    for packed in source.stream(903, count, 33, held_out=True):
        logits = net(frames_of(rendered(packed, RENDER_SIDE, device)))
        for name, wanted in labels_of(packed, device).items():
            right[name] += int((logits[name].argmax(1) == wanted).sum())
    return {name: n / count for name, n in right.items()}


def rounded(weights: np.ndarray) -> np.ndarray:
    """float16 with 8 significant bits: what is left out would only make the file larger."""
    bits = weights.astype(np.float16).view(np.uint16).astype(np.uint32)
    return ((bits + 4) & ~np.uint32(7)).astype(np.uint16).view(np.float16)


def train(args: argparse.Namespace, source: ClipSource, device: torch.device) -> None:
    deadline = Deadline(args.deadline_seconds, reserve=8)
    torch.manual_seed(3)
    net = ReaderNet().to(device)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.02)
    batches = source.stream(31, args.clips, 33, batch=64)
    seen = [(p := next(batches), frames_of(rendered(p, RENDER_SIDE, device))) for _ in range(args.first)]
    data, labels = torch.cat([x for _, x in seen]), [labels_of(p, device) for p, _ in seen]
    merged = {name: torch.cat([part[name] for part in labels]) for name in LABELS}
    schedule, step = Schedule(60 * args.minutes), 0
    schedule.begin()
    while not schedule.over() and not deadline.over():
        if step % 8 == 7 and (packed := next(batches, None)) is not None:
            data = torch.cat([data, frames_of(rendered(packed, RENDER_SIDE, device))])
            merged = {name: torch.cat([merged[name], new]) for name, new in labels_of(packed, device).items()}
        pick = torch.randint(len(data), (args.batch,), device=device)
        logits = net(disturbed(data[pick]))
        value = sum(F.cross_entropy(logits[name], merged[name][pick]) for name in LABELS)
        for group in opt.param_groups:
            group["lr"] = schedule.rate(2e-3, warmup_seconds=2)
        opt.zero_grad()
        value.backward()
        opt.step()
        step += 1
        if step % 500 == 0:
            print(f"reader step {step} clips {len(data)} loss {value.item():.4f}", flush=True)
    print(f"reader done: step {step}, held-out renders right: {accuracy(net, source, device)}", flush=True)
    np.savez_compressed(args.out, **{k: rounded(v.detach().cpu().numpy()) for k, v in net.state_dict().items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--deadline-seconds", type=float, help="when this process ends, everything included")
    parser.add_argument("--clips", type=int, default=100_000, help="at most, 64 new ones every 8 steps")
    parser.add_argument("--first", type=int, default=32, help="batches of 64 before the first step")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    with ClipSource(arguments.vocabulary, arguments.workers) as clip_source:
        train(arguments, clip_source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
