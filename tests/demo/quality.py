#!/usr/bin/env python3
"""The quality table: the same captions and seeds through several attentions, judged and set side by side.

    tests/demo/quality.py DIR --count 200 --slalomd build/cpu/bin/slalomd --model model/demo \\
        dense=dense sparse=sla@none sla=sla salad=salad sla-75=sla:0.25 sla-20=sla@adapters/step-20

A variant is NAME=ATTENTION[:TOPK][@FOLDER]: FOLDER has the attention/*.safetensors to use instead of the model's
own, `none` means untrained (pure sparse attention at the default top-k), and NAME=clips@FOLDER takes clips that are
there already, NNNN.mp4 (or .npy) as tests/demo/captions.py numbers them (the linear branch alone: python -m slalom_finetune
sample).  The first variant is what PSNR and SSIM compare with.  Clips stay in DIR/NAME: call it again to go on.
DIR gets table.md, table.json and, with --curve TITLE:X NAME=VALUE..., DIR/TITLE.svg.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from captions import clips_to_make
from chart import line_chart
from measures import consistency, load_frames, psnr, ssim
from reader import LABELS, Reader, clip_of

UNFINISHED = 3
READY = re.compile(r"^slalomd ready .*grpc=(\S+)")


@dataclass(frozen=True)
class Variant:
    name: str
    attention: str
    topk: str | None
    folder: str | None

    @classmethod
    def parse(cls, text: str) -> Variant:
        found = re.fullmatch(r"([\w.-]+)=(dense|sla|salad|clips)(?::([\d.]+))?(?:@(.+))?", text)
        if not found:
            raise argparse.ArgumentTypeError(f"'{text}' is not NAME=ATTENTION[:TOPK][@FOLDER]")
        return cls(*found.groups())


def model_with(model: Path, adapters: str | None, into: Path) -> Path:
    """The model folder, or one of links beside other adapters."""
    if adapters is None:
        return model
    into.mkdir()
    for part in model.resolve().iterdir():
        if part.name not in ("attention", "recipe"):
            (into / part.name).symlink_to(part)
    if adapters != "none":
        shutil.copytree(Path(adapters) / "attention", into / "attention")
    return into


class Server:
    """slalomd on a free port, for as long as the context lasts."""

    def __init__(self, program: Path, model: Path, options: list[str]):
        self.command = [str(program), "--models", str(model), "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0",
                        "--warm-up", "none", *options]

    def __enter__(self) -> str:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in self.process.stdout:
            if found := READY.match(line):
                return found.group(1)
        raise RuntimeError(f"slalomd ended with status {self.process.wait()}")

    def __exit__(self, *unused: object) -> None:
        self.process.terminate()
        self.process.wait(60)


def generate(variant: Variant, clips: list[dict], folder: Path, address: str, args: argparse.Namespace,
             end: float) -> bool:
    """Makes what is missing; beside each clip what the server said of it.  False when the time is up."""
    passed = ["--attention", variant.attention, *(["--topk", variant.topk] if variant.topk else []), *args.generate]

    def make(i: int) -> bool:
        clip = clips[i]
        file = folder / clip["file"]
        if file.exists() or time.time() > end:
            return file.exists()
        part = file.with_suffix(".part.mp4")
        command = [str(args.slalomd.with_name("slalom")), "--server", address, "generate", clip["caption"], "-o",
                   str(part), "--seed", str(i), "--json", "--quality", "100", *passed]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"\"{clip['caption']}\": {ended.stderr.strip() or ended.stdout.strip()}")
        file.with_suffix(".json").write_text(ended.stdout)
        part.replace(file)
        return True

    with ThreadPoolExecutor(args.parallel) as pool:
        return all(list(pool.map(make, range(len(clips)))))


def _find(value: object, name: str) -> float | None:
    """The first number under `name` anywhere in a JSON value."""
    if isinstance(value, dict):
        if isinstance(value.get(name), (int, float)):
            return float(value[name])
        value = list(value.values())
    if isinstance(value, list):
        return next((found for part in value if (found := _find(part, name)) is not None), None)
    return None


def made(folder: Path, clip: dict) -> Path | None:
    """A clip's file, as video or as frames; None when it is not there yet."""
    file = folder / clip["file"]
    return next((one for one in (file, file.with_suffix(".npy")) if one.exists()), None)


@cache
def reader() -> Reader:
    return Reader()


def judge_clip(folder: Path, clip: dict, against: Path | None) -> dict | None:
    """What one clip shows, and how like it is to the same clip in another folder; None when one of them is missing."""
    file, other = made(folder, clip), made(against, clip) if against else None
    if file is None or (against and other is None):
        return None
    frames = load_frames(file)
    found = reader().read(clip_of(frames))
    row = {name: float(found[name] == clip[name]) for name in LABELS}
    row["all"] = float(all(row.values()))
    row["subject"], row["background"] = consistency(frames)
    if against:
        reference = load_frames(other)
        row["psnr"], row["ssim"] = psnr(frames, reference), ssim(frames, reference)
    notes = json.loads(file.with_suffix(".json").read_text()) if file.with_suffix(".json").exists() else {}
    if (value := _find(notes, "sparsity")) is not None:
        row["sparsity"] = value
    if (total := _find(notes, "total_seconds")) is not None:  # of the job, without the wait for its turn
        row["seconds"] = total - (_find(notes, "queue_seconds") or 0)
    return row


def judge(folder: Path, clips: list[dict], against: Path | None, jobs: int = 1) -> dict:
    """Means over the clips that are there."""
    work = ([folder] * len(clips), clips, [against] * len(clips))
    if jobs > 1:
        with ProcessPoolExecutor(jobs) as pool:
            judged = list(pool.map(judge_clip, *work, chunksize=4))
    else:
        judged = map(judge_clip, *work)
    rows = [row for row in judged if row]
    names = {name for row in rows for name in row}
    return {"clips": len(rows), **{name: float(np.mean([row[name] for row in rows if name in row])) for name in names}}


def judge_once(folder: Path, clips: list[dict], against: Path | None, jobs: int = 1) -> dict:
    """The same, kept beside the clips until a file of theirs is newer."""
    asked = json.dumps([clips, str(against and against.resolve())])
    kept = folder / f".judged-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    files = [file for place in (folder, against) if place for file in place.iterdir() if not file.name.startswith(".")]
    if kept.exists() and kept.stat().st_mtime_ns > max((file.stat().st_mtime_ns for file in files), default=0):
        return json.loads(kept.read_text())
    found = judge(folder, clips, against, jobs)
    if found["clips"] == len(clips):
        kept.write_text(json.dumps(found))
    return found


def table(results: dict[str, dict]) -> str:
    columns = ("clips", "sparsity", *LABELS, "all", "subject", "background", "psnr", "ssim", "seconds")
    percent = {"sparsity", *LABELS, "all", "subject", "background"}

    def show(name: str, value: float | None) -> str:
        if value is None:
            return ""
        return f"{100 * value:.1f} %" if name in percent else f"{value:.0f}" if name == "clips" else f"{value:.2f}"

    lines = ["| attention | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(show(c, row.get(c)) for c in columns) + " |" for name, row in results.items()]
    return "\n".join(lines) + "\n"


def draw_curves(curves: list[list[str]], results: dict[str, dict], out: Path) -> None:
    """--curve TITLE:X NAME=VALUE ...: attributes and consistency of the variants NAME over VALUE."""
    for (heading, *points) in curves:
        title, x_name = heading.split(":", 1)
        places = [(name, float(value)) for name, value in (point.rsplit("=", 1) for point in points)]
        lines = {what: [(x, 100 * results[name][what]) for name, x in places if name in results]
                 for what in ("all", *LABELS, "subject", "background")}
        line_chart(out / f"{title.replace(' ', '-')}.svg", title, x_name, "%", lines)


def parse() -> argparse.Namespace:
    own = sys.argv[1:]
    passed = own[own.index("--") + 1:] if "--" in own else []
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="what follows -- goes to `slalom generate`")
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", type=Variant.parse, nargs="+")
    parser.add_argument("--count", type=int, default=200, help="captions: what they say depends on how many are drawn")
    parser.add_argument("--first", type=int, metavar="N", help="only the first so many of them")
    parser.add_argument("--seed", type=int, default=1, help="of the captions; clip i is made with seed i")
    parser.add_argument("--slalomd", type=Path, default=Path("build/cpu/bin/slalomd"), help="slalom stands beside it")
    parser.add_argument("--model", type=Path, default=Path("model/demo"))
    parser.add_argument("--server-options", default="", help="for slalomd, as one string")
    parser.add_argument("--parallel", type=int, default=4, help="clips asked for at a time")
    parser.add_argument("--jobs", type=int, default=1, help="processes that judge")
    parser.add_argument("--deadline-seconds", type=float, default=1e9, help="ends before, with status 3, to go on in the next call")
    parser.add_argument("--curve", nargs="+", action="append", default=[], metavar=("TITLE:X", "NAME=VALUE"))
    args = parser.parse_args(own[:own.index("--")] if "--" in own else own)
    args.generate = passed
    return args


def main() -> int:
    args = parse()
    end, finished = time.time() + args.deadline_seconds, True
    clips, results, first = clips_to_make(args.count, args.seed, held_out=True)[:args.first], {}, None
    (args.folder).mkdir(parents=True, exist_ok=True)
    (args.folder / "clips.json").write_text(json.dumps(clips, indent=1) + "\n")
    for variant in args.variants:
        folder = Path(variant.folder) if variant.attention == "clips" else args.folder / variant.name
        folder.mkdir(parents=True, exist_ok=True)
        missing = [clip for clip in clips if made(folder, clip) is None]
        if missing and variant.attention != "clips" and time.time() < end:
            with tempfile.TemporaryDirectory() as links:
                model = model_with(args.model, variant.folder, Path(links) / args.model.name)
                with Server(args.slalomd, model, args.server_options.split()) as address:
                    finished &= generate(variant, clips, folder, address, args, end)
        elif missing:
            finished = False
        results[variant.name] = judge_once(folder, clips, first, args.jobs)
        first = first or folder
        print(f"{variant.name}: {results[variant.name]}", flush=True)
    (args.folder / "table.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.folder / "table.md").write_text(table(results))
    draw_curves(args.curve, results, args.folder)
    print(table(results))
    return 0 if finished else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
