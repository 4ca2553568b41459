"""The whole recipe, phase by phase: VAE, latents, transformer with text encoder, evaluation, exported model.

    python make.py --work /tmp/demo --out out --minutes 9.4

Ends within --minutes.  Called again with the same --work it goes on where it stopped, in the middle of a
training too; exit status 0 says that everything is done, 3 that another call is needed.  --out gets the
model folder so far (model.tar in pieces, see pieces.py), contact sheets and report.txt, after every call.
With --gpus 0 1 2 3 phases run side by side: with --start and --keep-latents the VAE's decoder is trained while
its encoder makes latents, and the transformer begins with the first of them.
--tiny makes everything very small and short: a smoke run, whose model is good for nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

from phases import HERE, Call, Phase, add_call_arguments, script
from pieces import split

READER = HERE.parents[2] / "tests" / "demo" / "reader.npz"
PROMPTS = ["a red ball rolls from left to right over a green floor", "a blue cube spins on a wooden floor at sunset",
           "a big yellow ring rolls from right to left on a white checkered floor",
           "a robot dragon watches a purple cone that bounces up and down", "a pink diamond rises",
           "two dogs play in the snow"]


@dataclass(frozen=True)
class ClipSet:
    """Clips of one size: `clips` of them, encoded `chunk` at a time, unless `seconds` are over; and their training.

    `seconds` has one entry for each encoder, `gpus` says where they run.
    """

    size: int
    frames: int
    clips: int
    chunk: int
    seconds: tuple[int, ...]
    gpus: tuple[int, ...]
    batch: int
    turns: int


@dataclass(frozen=True)
class Sizes:
    """Everything that --tiny changes."""

    vae: tuple[str, ...] = ("--compile",)
    text: tuple[str, ...] = ()
    sets: tuple[ClipSet, ...] = (ClipSet(256, 33, 24_576, 16, (60, 300, 300), (0, 1, 2), 48, 4),
                                ClipSet(384, 49, 6_144, 4, (300,), (3,), 12, 1))
    compile: tuple[str, ...] = ("--compile",)
    evaluation: tuple[tuple[int, int, int], ...] = ((256, 33, 128), (384, 49, 32))  # size, frames, captions
    sampling: tuple[str, ...] = ("--steps", "20")
    least: float = 1.0  # factor on the seconds a phase needs at least
    tail: float = 45.0  # seconds that the transformer leaves to the evaluation


TINY = Sizes(vae=("--size", "32", "--crop", "16", "--frames", "9", "--pool", "8", "--batch", "1"),
             text=("--captions", "400", "--steps", "4"),
             sets=(ClipSet(32, 9, 32, 4, (60, 60), (0, 2), 2, 2), ClipSet(48, 13, 16, 4, (60,), (3,), 1, 1)), compile=(),
             evaluation=((32, 9, 4), (48, 13, 2)), sampling=("--steps", "4", "--batch", "2"), least=0.2, tail=40)


def phases_of(args: argparse.Namespace) -> list[Phase]:
    sizes = TINY if args.tiny else Sizes()
    vocabulary = ("--vocabulary", HERE.parent / "tokenizer" / "spiece.model", "--workers", args.workers)
    work, model = args.work, args.work / "model"
    vae_weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    start_vae = ("--start", args.start / "vae" / vae_weights.name) if args.start else ()
    start_vae += ("--decoder-only",) if args.keep_latents else ()
    start_dit = ("--start", args.start) if args.start and (args.start / "transformer").exists() else ()
    found = [] if READER.exists() else [Phase("reader", script("train_reader.py", *vocabulary, "--out", READER), 90)]
    if args.vae_minutes:
        found.append(Phase("vae", script(
            "train_vae.py", *vocabulary, "--checkpoint", work / "vae.pt", "--ship", model, "--rate", args.vae_rate,
            "--total-minutes", args.vae_minutes, "--sheet", work / "vae.png", *start_vae, *sizes.vae), 150, gpu=1,
            outputs=[work / "vae.png"]))
    elif not vae_weights.exists():
        vae_weights.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.start / "vae" / vae_weights.name, vae_weights)
    trained = tuple(phase.name for phase in found if phase.name == "vae")
    early = trained if not (args.start and args.keep_latents) else ()  # else the encoder is known from the start
    taught = args.text or work / "text.safetensors"
    if not args.text:
        found.append(Phase("text", script("train_text.py", *vocabulary[:2], "--out", taught, *sizes.text), 40, beside=True))
    encoder = args.start / "vae" / vae_weights.name if args.start and args.keep_latents else vae_weights
    sets, encoders = [], []
    for clips in sizes.sets if len(args.gpus) > 1 else (replace(one, seconds=(120,)) for one in sizes.sets):
        folder = work / f"latents-{clips.size}-{clips.frames}"
        sets.append(f"{folder}:{clips.batch}:{clips.turns}")
        for i, (seconds, gpu) in enumerate(zip(clips.seconds, clips.gpus)):
            encoders.append(Phase(f"latents {clips.size}x{clips.frames} {i + 1}", script(
                "latents.py", *vocabulary, "--vae", encoder, "--out", folder, "--size", clips.size, "--frames",
                clips.frames, "--clips", clips.clips, "--seconds", seconds, "--batch", clips.chunk, "--seed",
                1 + 1000 * i, *sizes.compile), seconds + 30, early, gpu, beside=True))
    waits = early if len(args.gpus) > 1 else early + tuple(phase.name for phase in encoders)
    length = ("--total-minutes", args.transformer_minutes) if args.transformer_minutes else ()
    found += encoders
    found.append(Phase("transformer", script(
        "train_transformer.py", "--latents", *sets, "--checkpoint", work / "denoiser.pt", "--ship", model, "--rate",
        args.transformer_rate, "--text", taught, *length, *start_dit, *sizes.compile), 90,
        waits + tuple(phase.name for phase in found if phase.name == "text"), tail=sizes.tail))
    judge = script("evaluate.py", *vocabulary[:2], "--model", model, *sizes.sampling)
    both = (*trained, "transformer")
    for size, frames, count in sizes.evaluation:
        sheet = work / f"clips-{size}-{frames}.png"
        found.append(Phase(f"evaluation {size}x{frames}", [*judge, "--size", str(size), "--frames", str(frames),
                           "--count", str(count), "--sheet", str(sheet)], 20, both, outputs=[sheet]))
    size, frames, _ = sizes.evaluation[0]
    sheet = work / "prompts.png"
    found.append(Phase("prompts", [*judge, "--size", str(size), "--frames", str(frames), "--sheet", str(sheet),
                                   "--prompts", *PROMPTS], 20, both, outputs=[sheet]))
    for phase in found:
        phase.least *= sizes.least
    return found


def pack(args: argparse.Namespace, call: Call, phases: list[Phase]) -> None:
    """Puts what there is so far into --out."""
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.work / "model"
    if model.exists():
        with tarfile.open(args.work / "model.tar", "w") as archive:
            archive.add(model, "model", filter=lambda member: None if member.name.endswith(".tmp") else member)
        call.table.append(f"model.tar, SHA-256 {split(args.work / 'model.tar', args.out)}")
    for file in (file for phase in phases for file in phase.outputs if file.exists()):
        shutil.copy(file, args.out)
    (args.out / "report.txt").write_text(call.report(phases))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_call_arguments(parser)
    parser.add_argument("--vae-minutes", type=float, default=6, help="of training, over all calls; 0: the VAE of --start")
    parser.add_argument("--transformer-minutes", type=float, help="of training, over all calls; else until the "
                        "end of this one")
    parser.add_argument("--vae-rate", type=float, default=2e-3)
    parser.add_argument("--transformer-rate", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help="model folder to go on from: VAE, and transformer if there")
    parser.add_argument("--keep-latents", action="store_true", help="train the VAE's decoder alone, so that the "
                        "transformer of --start still fits")
    parser.add_argument("--text", type=Path, help="a text encoder that has been taught before (train_text.py)")
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.work = args.work.resolve()
    call, phases = Call(args.work, args.minutes, args.gpus), phases_of(args)
    status = call.run(phases)
    pack(args, call, phases)
    print("\n".join(call.table), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
