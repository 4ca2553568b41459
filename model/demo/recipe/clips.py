"""Clips by the thousand: worker processes draw scenes and poses, the GPU renders them."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import random
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from motion import pack
from render import render
from scenes import Scene, caption, draw_scene, training_caption, twin
from tokenizer import Tokenizer

CAPTIONS_PER_CLIP = 4


@dataclass(frozen=True)
class Plan:
    """What one worker packs: `count` clips of `frames` frames drawn with `seed`; with `twins` every second one is the twin
    of the one before: the same patterns of captions, the same place and camera."""

    seed: int
    count: int
    frames: int
    held_out: bool
    vocabulary: Path
    twins: bool = False


@dataclass
class Packed:
    """Clips before rendering.  ids [n, CAPTIONS_PER_CLIP, MAX_TOKENS] int64."""

    scenes: list[Scene]
    captions: list[str]
    ids: np.ndarray
    static: np.ndarray
    poses: np.ndarray


def pack_plan(plan: Plan) -> Packed:
    rng = random.Random(plan.seed)
    tokenizer = Tokenizer(plan.vocabulary)
    if plan.twins:
        return _with_twins(plan, rng, tokenizer)
    return _packed([draw_scene(rng, plan.held_out) for _ in range(plan.count)], plan.frames, rng, tokenizer)


def _packed(scenes: list[Scene], frames: int, rng: random.Random, tokenizer: Tokenizer) -> Packed:
    ids = [[tokenizer.encode(training_caption(s, rng)) for _ in range(CAPTIONS_PER_CLIP)] for s in scenes]
    captions = [caption(s, rng) for s in scenes]
    return Packed(scenes, captions, np.array(ids), *pack(scenes, frames, rng))


def _with_twins(plan: Plan, rng: random.Random, tokenizer: Tokenizer) -> Packed:
    pairs = []
    for _ in range(-(-plan.count // 2)):
        scene = draw_scene(rng)
        other, state = twin(scene, rng), rng.getstate()
        for one in (scene, other):
            rng.setstate(state)
            pairs.append(_packed([one], plan.frames, rng, tokenizer))
    pairs = pairs[:plan.count]
    joined = {name: [x for one in pairs for x in getattr(one, name)] for name in ("scenes", "captions")}
    arrays = {name: np.concatenate([getattr(one, name) for one in pairs]) for name in ("ids", "static", "poses")}
    return Packed(**joined, **arrays)


def _end_with_parent() -> None:
    """A worker waits for work; it must not wait for a parent that was killed (Linux alone can say so)."""
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


class ClipSource:
    """Packs ahead in worker processes.  Use as a context manager."""

    def __init__(self, vocabulary: Path, workers: int = 8):
        self.vocabulary, self.ahead = vocabulary, 4 * workers
        self.pool = ProcessPoolExecutor(workers, mp.get_context("spawn"), _end_with_parent) if workers else None

    def __enter__(self) -> ClipSource:
        return self

    def __exit__(self, *unused: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def stream(self, seed: int, total: int, frames: int, held_out: bool = False, batch: int = 64,
               twins: bool = False) -> Iterator[Packed]:
        """`total` clips in batches; batch i depends on (seed, i) alone."""
        plans = (Plan(seed * 100_003 + i, min(batch, total - i * batch), frames, held_out, self.vocabulary, twins)
                 for i in range(-(-total // batch)))
        if self.pool is None:
            yield from map(pack_plan, plans)
            return
        waiting = deque(self.pool.submit(pack_plan, plan) for plan in islice(plans, self.ahead))
        while waiting:
            packed = waiting.popleft().result()
            waiting.extend(self.pool.submit(pack_plan, plan) for plan in islice(plans, 1))
            yield packed


def rendered(packed: Packed, size: int, device: torch.device) -> Tensor:
    """uint8 [n, F, 3, size, size]."""
    return render(torch.from_numpy(packed.static).to(device), torch.from_numpy(packed.poses).to(device), size, size)


def to_model(clips: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """uint8 [n, F, 3, H, W] -> [n, 3, F, H, W] in [-1, 1]."""
    return clips.to(dtype).transpose(1, 2) / 127.5 - 1.0


def to_bytes(clips: Tensor) -> Tensor:
    """The way back: uint8 [n, F, 3, H, W]."""
    return ((clips.float().clamp(-1, 1) + 1.0) * 127.5).to(torch.uint8).transpose(1, 2)


def save_sheet(rows: list[Tensor], path: Path, columns: int = 6, side: int = 160) -> None:
    """Writes a contact sheet: one row per clip (uint8 [F, 3, H, W]), `columns` frames spread over it."""
    from PIL import Image
    lines = []
    for clip in rows:
        picks = torch.linspace(0, clip.shape[0] - 1, columns).round().long()
        frames = torch.nn.functional.interpolate(clip[picks].float().cpu(), size=(side, side), mode="area")
        lines.append(torch.cat(list(frames.permute(0, 2, 3, 1)), 1))
    Image.fromarray(torch.cat(lines, 0).round().to(torch.uint8).numpy()).save(path)
