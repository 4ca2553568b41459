"""Reads colour, shape and motion back from a clip of the demo model.

A small convolutional network, trained on rendered clips alone (model/demo/recipe/train_reader.py); it
has never seen a generated one.  Inference here is plain numpy.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

FRAMES, SIDE = 9, 48
LABELS = {
    "color": ["red", "green", "blue", "yellow", "orange", "purple", "pink", "white", "black", "cyan"],
    "shape": ["ball", "cube", "cone", "cylinder", "ring", "pyramid", "diamond"],
    "motion": ["right", "left", "toward", "away", "bounce", "hop_right", "hop_left", "spin", "circle",
               "rise", "fall"],
}


def clip_of(frames: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3], H and W multiples of SIDE or not -> float32 [FRAMES, 3, SIDE, SIDE] in [0, 1]."""
    picks = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    x = frames[picks].astype(np.float32) / 255.0
    for axis in (1, 2):  # area average
        edges = np.linspace(0, x.shape[axis], SIDE + 1)
        sums = np.concatenate([np.zeros_like(x.take([0], axis)), x.cumsum(axis, np.float64)], axis)
        low = np.minimum(edges.astype(int), x.shape[axis] - 1)
        part = np.expand_dims(edges - low, tuple(a for a in range(4) if a != axis))
        at_edges = sums.take(low, axis) * (1 - part) + sums.take(low + 1, axis) * part
        x = (np.diff(at_edges, axis=axis) / (edges[1] - edges[0])).astype(np.float32)
    return x.transpose(0, 3, 1, 2)


def load_clip(file: Path) -> np.ndarray:
    """A video file's clip_of, decoded by ffmpeg."""
    probe = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "stream=width,height", "-of",
             "csv=p=0", str(file)]
    width, height = map(int, subprocess.run(probe, capture_output=True, check=True, text=True).stdout.strip().split(","))
    command = ["ffmpeg", "-v", "error", "-i", str(file), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return clip_of(np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3))


def _convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3, stride 2, zero padding 1: x [C, H, W] -> [O, H / 2, W / 2]."""
    c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    patches = np.stack([padded[:, ky:ky + h:2, kx:kx + w:2] for ky in range(3) for kx in range(3)], 1)
    out = weight.reshape(len(weight), -1) @ patches.reshape(c * 9, -1)
    return (out + bias[:, None]).reshape(len(weight), h // 2, w // 2)


class Reader:
    def __init__(self, weights: Path = Path(__file__).with_name("reader.npz")):
        self.weights = {k: v.astype(np.float32) for k, v in np.load(weights).items()}

    def scores(self, clip: np.ndarray) -> dict[str, np.ndarray]:
        """Logits per attribute for one clip [FRAMES, 3, SIDE, SIDE]."""
        x = clip.reshape(-1, SIDE, SIDE) * 2 - 1
        for i in range(4):
            x = np.maximum(_convolve(x, self.weights[f"conv.{i}.weight"], self.weights[f"conv.{i}.bias"]), 0)
        features = x.reshape(-1)
        return {name: self.weights[f"head.{name}.weight"] @ features + self.weights[f"head.{name}.bias"]
                for name in LABELS}

    def read(self, clip: np.ndarray) -> dict[str, str]:
        return {name: LABELS[name][int(logits.argmax())] for name, logits in self.scores(clip).items()}
