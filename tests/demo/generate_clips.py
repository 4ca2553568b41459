#!/usr/bin/env python3
"""Lets a running slalomd make clips for captions of scenes that training never saw, for check_clips.py.

    tests/demo/generate_clips.py DIR --count 100 --slalom build/cpu/bin/slalom -- --attention dense --steps 20
    tests/demo/check_clips.py DIR

What follows -- goes to `slalom generate`; without an attention there the model's default is judged.
Clips that are in DIR already stay: call it again to go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from captions import clips_to_make


def main() -> int:
    own = sys.argv[1:]
    passed = own[own.index("--") + 1:] if "--" in own else []
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the captions; clip i is made with seed i")
    parser.add_argument("--slalom", default="slalom", help="the client program")
    parser.add_argument("--server", default="127.0.0.1:8500")
    args = parser.parse_args(own[:own.index("--")] if "--" in own else own)
    args.folder.mkdir(parents=True, exist_ok=True)
    clips = clips_to_make(args.count, args.seed, held_out=True)
    for i, clip in enumerate(clips):
        file, begin = args.folder / clip["file"], time.time()
        if file.exists():
            continue
        part = file.with_suffix(".part.mp4")
        command = [args.slalom, "--server", args.server, "generate", clip["caption"], "-o", str(part), "--seed", str(i)]
        made = subprocess.run([*command, *passed], capture_output=True, text=True)
        if made.returncode:
            print(f"\"{clip['caption']}\": {made.stderr.strip() or made.stdout.strip()}", file=sys.stderr)
            return 1
        part.replace(file)
        print(f"{i + 1}/{len(clips)} {time.time() - begin:.1f} s \"{clip['caption']}\"", flush=True)
    (args.folder / "clips.json").write_text(json.dumps(clips, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
