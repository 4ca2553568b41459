#!/usr/bin/env python3
"""Prints captions with what a clip of each must show, as JSON.

    tests/demo/captions.py --held-out --count 100 --seed 1

--held-out: of scenes that training never saw; without it, of scenes that it may have seen.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model" / "demo" / "recipe"))
from scenes import caption, draw_scene  # noqa: E402


def clips_to_make(count: int, seed: int, held_out: bool) -> list[dict[str, str]]:
    """File name, caption and what the clip must show, for each clip."""
    rng = random.Random(seed)
    scenes = [draw_scene(rng, held_out) for _ in range(count)]
    return [{"file": f"{i:04d}.mp4", "caption": caption(s, rng), **s.attributes()} for i, s in enumerate(scenes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(clips_to_make(args.count, args.seed, args.held_out), indent=1))


if __name__ == "__main__":
    main()
