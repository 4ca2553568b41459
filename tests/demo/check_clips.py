#!/usr/bin/env python3
"""Says how often generated clips show what their captions say.

    tests/demo/check_clips.py DIR [--json]

DIR/clips.json is a list of {"file", "caption", "color", "shape", "motion", ...}.  Exit code 1 when an
attribute falls below --least (a share, default 0: report only).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from reader import LABELS, Reader, load_clip


def check(folder: Path) -> dict:
    reader = Reader()
    clips = json.loads((folder / "clips.json").read_text())
    right = dict.fromkeys(LABELS, 0)
    all_right, wrong = 0, []
    for clip in clips:
        found = reader.read(load_clip(folder / clip["file"]))
        misses = {name: found[name] for name in LABELS if found[name] != clip[name]}
        for name in LABELS:
            right[name] += name not in misses
        all_right += not misses
        if misses:
            wrong.append({"file": clip["file"], "caption": clip["caption"], "read": misses})
    count = max(len(clips), 1)
    return {"clips": len(clips), "right": {name: n / count for name, n in right.items()}, "all": all_right / count,
            "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--least", type=float, default=0.0)
    args = parser.parse_args()
    report = check(args.folder)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for clip in report["wrong"]:
            print(f"{clip['file']}: \"{clip['caption']}\" reads as {clip['read']}")
        for name, share in report["right"].items():
            print(f"{name:8s} {100 * share:5.1f} % of {report['clips']} clips")
        print(f"{'all':8s} {100 * report['all']:5.1f} %")
    return 0 if report["clips"] and min(report["right"].values()) >= args.least else 1


if __name__ == "__main__":
    sys.exit(main())
