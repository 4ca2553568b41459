"""The whole recipe, phase by phase: VAE, latents, transformer with text encoder, evaluation, exported model.

    python make.py --work /tmp/demo --out out --minutes 9.4

Ends within --minutes.  Called again with the same --work it goes on where it stopped, in the middle of a
training too; exit status 0 says that everything is done, 3 that another call is needed.  --out gets the
model folder so far (model.tar in pieces, see pieces.py), contact sheets and report.txt, after every call.
--tiny makes everything very small and short: a smoke run, whose model is good for nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pieces import split

HERE = Path(__file__).resolve().parent
READER = HERE.parents[2] / "tests" / "demo" / "reader.npz"
UNFINISHED = 3
PACKING = 6.0  # seconds kept for what comes after the phases
PROMPTS = ["a red ball rolls from left to right over a green floor", "a blue cube spins on a wooden floor at sunset",
           "a big yellow ring rolls from right to left on a white checkered floor",
           "a robot dragon watches a purple cone that bounces up and down", "a pink diamond rises",
           "two dogs play in the snow"]


@dataclass(frozen=True)
class ClipSet:
    """Clips of one size: `clips` of them, encoded `chunk` at a time, unless `seconds` are over; and their training."""

    size: int
    frames: int
    clips: int
    chunk: int
    seconds: int
    batch: int
    turns: int


@dataclass(frozen=True)
class Sizes:
    """Everything that --tiny changes."""

    vae: tuple[str, ...] = ("--compile",)
    sets: tuple[ClipSet, ...] = (ClipSet(256, 33, 16_384, 16, 120, 48, 5), ClipSet(384, 49, 4_096, 4, 80, 12, 1))
    compile: tuple[str, ...] = ("--compile",)
    evaluation: tuple[tuple[int, int, int], ...] = ((256, 33, 128), (384, 49, 32))  # size, frames, captions
    sampling: tuple[str, ...] = ("--steps", "20")
    least: float = 1.0  # factor on the seconds a phase needs at least


TINY = Sizes(vae=("--size", "32", "--crop", "16", "--frames", "9", "--pool", "8", "--batch", "1"),
             sets=(ClipSet(32, 9, 32, 4, 20, 2, 2), ClipSet(48, 13, 16, 4, 20, 1, 1)), compile=(),
             evaluation=((32, 9, 4), (48, 13, 2)), sampling=("--steps", "4", "--batch", "2"), least=0.2)


@dataclass
class Phase:
    """One script's run.  `least`: seconds without which it is better left to the next call."""

    name: str
    command: list[str]
    least: float = 30.0
    needed: bool = True
    outputs: list[Path] = field(default_factory=list)  # copied to --out after each call, if they exist


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(HERE / name), *map(str, arguments)]


def phases_of(args: argparse.Namespace) -> list[Phase]:
    sizes = TINY if args.tiny else Sizes()
    vocabulary = ("--vocabulary", HERE.parent / "tokenizer" / "spiece.model", "--workers", args.workers)
    work, model = args.work, args.work / "model"
    vae_weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    start_vae = ("--start", args.start / "vae" / vae_weights.name) if args.start else ()
    start_vae += ("--decoder-only",) if args.keep_latents else ()
    start_dit = ("--start", args.start) if args.start and (args.start / "transformer").exists() else ()
    found = [
        Phase("reader", script("train_reader.py", *vocabulary, "--out", READER), 90, not READER.exists()),
        Phase("vae", script("train_vae.py", *vocabulary, "--checkpoint", work / "vae.pt", "--ship", model, "--rate",
                            args.vae_rate, "--total-minutes", args.vae_minutes, "--sheet", work / "vae.png",
                            *start_vae, *sizes.vae), 150, outputs=[work / "vae.png"])]
    sets = []
    for clips in sizes.sets:
        file = work / f"latents-{clips.size}-{clips.frames}.pt"
        sets.append(f"{file}:{clips.batch}:{clips.turns}")
        found.append(Phase(f"latents {clips.size}x{clips.frames}", script(
            "latents.py", *vocabulary, "--vae", vae_weights, "--out", file, "--size", clips.size, "--frames",
            clips.frames, "--clips", clips.clips, "--seconds", clips.seconds, "--batch", clips.chunk,
            *sizes.compile), clips.seconds + 30))
    found.append(Phase("transformer", script(
        "train_transformer.py", "--latents", *sets, "--checkpoint", work / "denoiser.pt", "--ship", model,
        "--total-minutes", args.transformer_minutes, "--rate", args.transformer_rate, *start_dit, *sizes.compile), 90))
    judge = script("evaluate.py", *vocabulary[:2], "--model", model, *sizes.sampling)
    for size, frames, count in sizes.evaluation:
        sheet = work / f"clips-{size}-{frames}.png"
        found.append(Phase(f"evaluation {size}x{frames}", [*judge, "--size", str(size), "--frames", str(frames),
                           "--count", str(count), "--sheet", str(sheet)], 60, outputs=[sheet]))
    size, frames, _ = sizes.evaluation[0]
    sheet = work / "prompts.png"
    found.append(Phase("prompts", [*judge, "--size", str(size), "--frames", str(frames), "--sheet", str(sheet),
                                   "--prompts", *PROMPTS], 40, outputs=[sheet]))
    for phase in found:
        phase.least *= sizes.least
    return [phase for phase in found if phase.needed]


class Call:
    """This call's clock, and SIGTERM, which ends the call early but in order."""

    def __init__(self, minutes: float):
        self.end = time.time() + 60 * minutes - PACKING
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *unused: object) -> None:
        self.end = 0.0

    def left(self) -> float:
        return self.end - time.time()

    def run(self, phase: Phase, log: Path, environment: dict[str, str], show: Callable[[str], None]) -> int:
        """Exit status of the phase's script; its output goes to `log` and, as it comes, to `show`."""
        command = [*phase.command, "--deadline-seconds", f"{self.left():.1f}"]
        with log.open("ab") as out, log.open("rb") as shown:
            shown.seek(0, os.SEEK_END)
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, process_group=0)
            asked = 0.0
            while child.poll() is None:
                time.sleep(0.25)
                show(shown.read().decode(errors="replace"))
                if self.left() < 0 and not asked:
                    child.terminate()
                    asked = time.time()
                if asked and time.time() - asked > PACKING / 2:
                    os.killpg(child.pid, signal.SIGKILL)
            show(shown.read().decode(errors="replace"))
        return child.returncode


def pack(args: argparse.Namespace, phases: list[Phase], table: list[str]) -> None:
    """Puts what there is so far into --out."""
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.work / "model"
    if model.exists():
        with tarfile.open(args.work / "model.tar", "w") as archive:
            archive.add(model, "model", filter=lambda member: None if member.name.endswith(".tmp") else member)
        table.append(f"model.tar, SHA-256 {split(args.work / 'model.tar', args.out)}")
    for file in (file for phase in phases for file in phase.outputs if file.exists()):
        shutil.copy(file, args.out)
    logs = [f"== {phase.name}\n{log.read_text(errors='replace')}" for phase in phases
            if (log := args.work / "log" / f"{phase.name}.log").exists()]
    (args.out / "report.txt").write_text("\n".join(table + logs))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder kept from call to call")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of this call, everything included")
    parser.add_argument("--vae-minutes", type=float, default=6, help="of training, over all calls")
    parser.add_argument("--transformer-minutes", type=float, default=12.5, help="of training, over all calls")
    parser.add_argument("--vae-rate", type=float, default=2e-3)
    parser.add_argument("--transformer-rate", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help="model folder to go on from: VAE, and transformer if there")
    parser.add_argument("--keep-latents", action="store_true", help="train the VAE's decoder alone, so that the "
                        "transformer of --start still fits")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def main() -> int:
    args = parse()
    call, phases = Call(args.minutes), phases_of(args)
    work = args.work.resolve()
    (work / "log").mkdir(parents=True, exist_ok=True)
    caches = {name: str(work / "cache" / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    environment = {**os.environ, **caches, "PYTHONUNBUFFERED": "1"}
    table, status = [], 0
    for phase in phases:
        done, log = (work / "log" / f"{phase.name}.{end}" for end in ("done", "log"))
        if done.exists():
            table.append(f"{phase.name:20s} done before")
            continue
        if call.left() < phase.least:
            table.append(f"{phase.name:20s} left to the next call: needs {phase.least:.0f} s of {call.left():.0f} left")
            status = UNFINISHED
            break
        begin = time.time()
        status = call.run(phase, log, environment, lambda text: print(text, end="", flush=True))
        seconds = time.time() - begin
        if status == 0:
            done.touch()
        table.append(f"{phase.name:20s} {seconds:5.0f} s  " + {0: "done", UNFINISHED: "goes on in the next call"}.get(
            status, f"failed: status {status}"))
        if status:
            break
    pack(args, phases, table)
    print("\n".join(table), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
