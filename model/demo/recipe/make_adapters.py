"""The demo model's adapters, phase by phase: latents of rendered clips, then SLA and SALAD, each against the dense
model as its teacher.

    python make_adapters.py --work /tmp/adapters --out out --minutes 9.5

Ends within --minutes.  Called again with the same --work it goes on where it stopped, in the middle of a training
too; exit status 0 says that everything is done, 3 that another call is needed.  --out gets attention/*.safetensors
for the model folder, {sla,salad}/step-N/attention/ (at fractions of the steps, for the curves) and report.txt, after
every call.  --extras adds what the quality table compares: SLA in tiles, and the linear branch alone.  --tiny makes
everything very small and short, on a CPU too: a smoke run, whose adapters are good for nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from make import HERE, UNFINISHED, Call, Phase, script

FINETUNE = HERE.parents[1] / "finetune"
MODEL = HERE.parent


@dataclass(frozen=True)
class Sizes:
    """Everything that --tiny changes."""

    size: int = 256
    frames: int = 33
    clips: int = 6_144
    chunk: int = 16
    seconds: int = 75  # of rendering and encoding
    batch: int = 48
    compile: tuple[str, ...] = ("--compile",)
    length: tuple[str, ...] = ()  # instead of the minutes
    least: float = 1.0  # factor on the seconds a phase needs at least


TINY = Sizes(32, 9, 4, 2, 150, 2, (), ("--steps", "6", "--warmup", "2"), 0.2)

# 36 blocks of 64 tokens at 256x256x33: one critical block is a sparsity of 97.2 %, three are 91.7 %.
SLA = ("--attention", "sla", "--topk", 0.05, "--negligible", 0.1, "--scope", "marginal")
SALAD = ("--attention", "salad", "--topk", 0.1)
TILED = (*SLA, "--tile", "4,4,4")
LINEAR = ("--attention", "sla", "--topk", 0, "--scope", "all")
TRAINING = ("--train", "lora", "--rank", 64, "--loss", "teacher", "--block-loss", 0.5, "--rate", 2e-3, "--base-rate",
            8e-4, "--warmup", 100, "--average", 0.998, "--snapshots", 0.02, 0.06, 0.2, 0.5)


def finetune(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "slalom_finetune", *map(str, arguments)]


def phases_of(args: argparse.Namespace) -> list[Phase]:
    sizes, work = TINY if args.tiny else Sizes(), args.work
    encoded, prepared = work / "encoded.pt", work / "latents.safetensors"
    vae = MODEL / "vae" / "diffusion_pytorch_model.safetensors"
    found = [
        Phase("latents", script(
            "latents.py", "--vocabulary", MODEL / "tokenizer" / "spiece.model", "--workers", args.workers, "--vae", vae,
            "--out", encoded, "--size", sizes.size, "--frames", sizes.frames, "--clips", sizes.clips, "--seconds",
            sizes.seconds, "--batch", sizes.chunk, "--seed", 77, *sizes.compile), sizes.seconds + 30),
        Phase("prepare", finetune("prepare", "--model", MODEL, "--recipe-latents", encoded, "--out", prepared), 25)]
    kinds = {"sla": SLA, "salad": SALAD} | ({"tiled": TILED, "linear": LINEAR} if args.extras else {})
    for name, options in kinds.items():
        length = sizes.length or ("--minutes", args.adapter_minutes)
        found.append(Phase(name, finetune(
            "train", "--model", MODEL, "--data", prepared, "--work", work / name, "--out", work / name / "out", *options,
            *TRAINING, "--batch", sizes.batch, *sizes.compile, *length), 60))
    for phase in found:
        phase.least *= sizes.least
    return found


def pack(args: argparse.Namespace, phases: list[Phase], table: list[str]) -> None:
    """Puts what there is so far into --out."""
    args.out.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        made = args.work / phase.name / "out"
        for file in sorted(made.glob("**/attention/*.safetensors")):
            step = file.parents[1].relative_to(made)
            shipped = str(step) == "." and phase.name in ("sla", "salad")
            folder = args.out / ("." if shipped else Path(phase.name) / step) / "attention"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
        if (args.work / phase.name / "log.jsonl").exists():
            shutil.copy(args.work / phase.name / "log.jsonl", args.out / f"losses-{phase.name}.jsonl")
    logs = [f"== {phase.name}\n{log.read_text(errors='replace')}" for phase in phases
            if (log := args.work / "log" / f"{phase.name}.log").exists()]
    (args.out / "report.txt").write_text("\n".join(table + logs))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder kept from call to call")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of this call, everything included")
    parser.add_argument("--adapter-minutes", type=float, default=3.5, help="of training, for each adapter")
    parser.add_argument("--extras", action="store_true")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def run_phases(args: argparse.Namespace, phases: list[Phase]) -> tuple[int, list[str]]:
    """Exit status and what became of each phase, within args.minutes; done ones are not run again."""
    call = Call(args.minutes)
    (args.work / "log").mkdir(parents=True, exist_ok=True)
    caches = {name: str(args.work / "cache" / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    paths = os.pathsep.join(filter(None, (str(FINETUNE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **caches, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    table, status = [], 0
    for phase in phases:
        done, log = (args.work / "log" / f"{phase.name}.{end}" for end in ("done", "log"))
        if done.exists():
            table.append(f"{phase.name:10s} done before")
            continue
        if call.left() < phase.least:
            table.append(f"{phase.name:10s} left to the next call: needs {phase.least:.0f} s of {call.left():.0f} left")
            status = UNFINISHED
            break
        begin = time.time()
        status = call.run(phase, log, environment, lambda text: print(text, end="", flush=True))
        if status < 0 and call.left() < 0:
            status = UNFINISHED  # it was stopped before it could listen
        if status == 0:
            done.touch()
        table.append(f"{phase.name:10s} {time.time() - begin:5.0f} s  " + {
            0: "done", UNFINISHED: "goes on in the next call"}.get(status, f"failed: status {status}"))
        if status:
            break
    return status, table


def main() -> int:
    args = parse()
    args.work = args.work.resolve()
    phases = phases_of(args)
    status, table = run_phases(args, phases)
    pack(args, phases, table)
    print("\n".join(table), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
