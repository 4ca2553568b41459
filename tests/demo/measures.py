"""What two clips, or the frames of one, have in common.  Plain numpy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

WINDOW = 8  # of SSIM, in pixels


def load_frames(file: Path) -> np.ndarray:
    """A video or a picture by ffmpeg, or an array (.npy): uint8 [F, H, W, 3]."""
    if file.suffix == ".npy":
        return np.load(file)
    probe = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "stream=width,height", "-of",
             "csv=p=0", str(file)]
    width, height = map(int, subprocess.run(probe, capture_output=True, check=True, text=True).stdout.strip().split(","))
    command = ["ffmpeg", "-v", "error", "-i", str(file), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of whole clips, in dB; 99 when they are equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def _means(x: np.ndarray) -> np.ndarray:
    """Over windows of WINDOW x WINDOW, every half window: [F, H, W] -> [F, h, w]."""
    sums = np.pad(x, ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
    step = WINDOW // 2
    rows = np.arange(0, x.shape[1] - WINDOW + 1, step)
    columns = np.arange(0, x.shape[2] - WINDOW + 1, step)
    below, right = rows + WINDOW, columns + WINDOW
    corner = lambda r, c: sums[:, r][:, :, c]  # noqa: E731
    return (corner(below, right) - corner(rows, right) - corner(below, columns) + corner(rows, columns)) / WINDOW**2


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of luma, mean over windows and frames."""
    weights = np.array([0.299, 0.587, 0.114])
    x, y = (clip.astype(np.float64) @ weights for clip in (a, b))
    mx, my = _means(x), _means(y)
    vx, vy, cov = _means(x * x) - mx * mx, _means(y * y) - my * my, _means(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


def _features(pixels: np.ndarray) -> np.ndarray:
    """A histogram of colours, 4 x 4 x 4 soft bins, of unit length: what a body looks like wherever it is."""
    place = np.clip(pixels.reshape(-1, 3).astype(np.float64) / 255 * 4 - 0.5, 0, 3)
    low = np.minimum(place.astype(int), 2)
    part = place - low
    bins = np.zeros((4, 4, 4))
    for corner in range(8):
        bit = np.array([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
        index = low + bit
        np.add.at(bins, tuple(index.T), np.prod(np.where(bit, part, 1 - part), 1))
    return bins.ravel() / max(np.linalg.norm(bins), 1e-9)


def _moving(clip: np.ndarray) -> np.ndarray:
    """Where each frame differs from the clip's median picture: bool [F, H, W]."""
    background = np.median(clip, axis=0)
    return np.abs(clip.astype(np.float64) - background).max(-1) > 40


def consistency(clip: np.ndarray) -> tuple[float, float]:
    """(subject, background) in [0, 1]: means over frames of the likeness with the frame before and the first one,
    as VBench has it, with colour histograms for the subject and PSNR-like likeness for the still background in the
    place of its networks' features.  The demo's camera stands still, so what differs from the median picture is the
    subject; a clip in which nothing moves has only a background."""
    if len(clip) == 1:
        return 1.0, 1.0
    moving = _moving(clip)
    still = ~moving.any(0)
    frames = clip.astype(np.float64)
    background = [1 - np.abs(frames[i][still] - frames[j][still]).mean() / 255
                  for i in range(1, len(clip)) for j in (0, i - 1)] if still.any() else [0.0]
    seen = [_features(frame[mask]) for frame, mask in zip(clip, moving) if mask.sum() >= 30]
    subject = [float(seen[i] @ seen[j]) for i in range(1, len(seen)) for j in (0, i - 1)]
    return float(np.mean(subject)) if subject else 1.0, float(np.mean(background))
