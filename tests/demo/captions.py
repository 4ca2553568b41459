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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    scenes = [draw_scene(rng, args.held_out) for _ in range(args.count)]
    clips = [{"file": f"{i:04d}.mp4", "caption": caption(s, rng), **s.attributes()} for i, s in enumerate(scenes)]
    print(json.dumps(clips, indent=1))


if __name__ == "__main__":
    main()
