#!/usr/bin/env python3
"""Renders the ground-truth clips of clips/, by which reader and checker are tested.

    TRITON_INTERPRET=1 tests/demo/make_clips.py tests/demo/clips

Needs what the recipe needs (torch, triton) and ffmpeg; a GPU is faster than the interpreter.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model" / "demo" / "recipe"))
from motion import pack  # noqa: E402
from render import render  # noqa: E402
from scenes import Scene, caption  # noqa: E402

SIDE, FRAMES, SEED = 96, 9, 5
SCENES = [
    Scene("red", "ball", "right", "medium", "green", "checkered", "day", rolls=True),
    Scene("blue", "cube", "bounce", "big", "brown", "wooden", "day", rolls=False),
    Scene("yellow", "cone", "fall", "medium", "gray", "tiled", "sunset", rolls=False),
]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    static, poses = (torch.from_numpy(x).to(device) for x in pack(SCENES, FRAMES, rng))
    clips = render(static, poses, SIDE, SIDE, block=16384).permute(0, 1, 3, 4, 2).cpu().numpy()
    facts = []
    for scene, clip in zip(SCENES, clips):
        name = f"{scene.color}-{scene.shape}-{scene.motion}.mp4"
        command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIDE}x{SIDE}", "-r", "4",
                   "-i", "-", "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", str(folder / name)]
        subprocess.run(command, input=clip.tobytes(), check=True)
        facts.append({"file": name, "caption": caption(scene, rng), **scene.attributes()})
    (folder / "clips.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
