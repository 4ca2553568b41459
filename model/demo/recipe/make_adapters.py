"""The demo model's adapters, phase by phase: latents of rendered clips, SLA and SALAD, each against the dense model
as its teacher, then the quality table.

    python make_adapters.py --work /tmp/adapters --out out --minutes 9.5 --gpus 0 1

Ends within --minutes.  Called again with the same --work it goes on where it stopped, in the middle of a training
too; exit status 0 says that everything is done, 3 that another call is needed.  --out gets attention/*.safetensors
for the model folder, {sla,salad}/at-SHARE/attention/ (at shares of the steps, for the curves) and report.txt, after
every call.  --table N adds what the quality table compares: SLA in tiles, and the linear branch alone; then N captions that
training never saw are drawn with all of them, in PyTorch, from slalomd's noise, judged (tests/demo/quality.py), and --out
gets table.md and, from fewer captions but more sparsities and steps, curves.md and its pictures.  --tiny makes everything very small and short, on a CPU too: a smoke run, whose adapters
are good for nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from phases import HERE, Call, Phase, add_call_arguments, script

MODEL = HERE.parent
TESTS = HERE.parents[2] / "tests" / "demo"


@dataclass(frozen=True)
class ClipSet:
    """Clips of one size: at most `clips` from each encoder, encoded `chunk` at a time; and their training."""

    size: int
    frames: int
    clips: int
    chunk: int
    gpus: tuple[int, ...]  # of the encoders
    batch: int
    turns: int


@dataclass(frozen=True)
class Sizes:
    """Everything that --tiny changes."""

    sets: tuple[ClipSet, ...] = (ClipSet(256, 33, 6_144, 16, (0, 1), 48, 4), ClipSet(384, 49, 2_048, 4, (2,), 12, 1))
    seconds: int = 75  # of rendering and encoding
    compile: tuple[str, ...] = ("--compile",)
    steps: int | None = None  # instead of the minutes
    sampling: tuple[str, ...] = ("--batch", "50")
    least: float = 1.0  # factor on the seconds a phase needs at least


TINY = Sizes((ClipSet(32, 9, 4, 2, (0, 1), 2, 2), ClipSet(48, 13, 4, 2, (0,), 1, 1)), 150, (),
             6, ("--steps", "2", "--batch", "2"), 0.2)

# 36 blocks of 64 tokens at 256x256x33: one critical block is a sparsity of 97.2 %, three are 91.7 %.
SLA = ("--attention", "sla", "--topk", 0.05, "--negligible", 0.1, "--scope", "marginal")
SALAD = ("--attention", "salad", "--topk", 0.1)
KINDS = {"sla": SLA, "salad": SALAD, "tiled": (*SLA, "--tile", "4,4,4"),
         "linear": ("--attention", "sla", "--topk", 0, "--scope", "all")}
SHIPPED = ("sla", "salad")
GPUS = {"sla": 0, "salad": 1, "tiled": 2, "linear": 2}
TOPKS = (0.1, 0.25, 0.5)  # of the curve, beside the default
SNAPSHOTS = (0.01, 0.05, 0.2, 0.5)  # of the steps
TRAINING = ("--train", "lora", "--lora-on", "all", "--loss", "teacher", "--block-loss", 0.5, "--guided-loss", 0.1, "--trajectories",
            0.5, "--noise-levels", "uniform", "--rate", 2e-3, "--base-rate", 1e-3, "--warmup", 100, "--average", 0.998,
            "--no-deterministic", "--save-seconds", 25, "--snapshots", *SNAPSHOTS)


def finetune(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "slalom_finetune", *map(str, arguments)]


def write_captions(file: Path, count: int, suffix: str) -> None:
    """Captions of scenes that training never saw, and what their clips must show."""
    sys.path.insert(0, str(TESTS))
    from captions import clips_to_make
    clips = [{**clip, "file": clip["file"].replace(".mp4", suffix)} for clip in clips_to_make(count, 1, held_out=True)]
    file.write_text(json.dumps(clips))


def encoders(args: argparse.Namespace, clips: ClipSet, seconds: int, seed: int, compiled: tuple[str, ...]) -> list[Phase]:
    """Into one folder of latents, from several GPUs if there are any."""
    vae = MODEL / "vae" / "diffusion_pytorch_model.safetensors"
    gpus = clips.gpus if len(args.gpus) > 1 else clips.gpus[:1]
    return [Phase(f"latents {clips.size}x{clips.frames} {i + 1}", script(
        "latents.py", "--vocabulary", MODEL / "tokenizer" / "spiece.model", "--workers", args.workers, "--vae", vae, "--out",
        args.work / f"latents-{clips.size}-{clips.frames}", "--size", clips.size, "--frames", clips.frames, "--clips",
        clips.clips, "--seconds", seconds, "--batch", clips.chunk, "--seed", seed + 1000 * i, *compiled), seconds + 30,
        gpu=gpu, beside=True) for i, gpu in enumerate(gpus)]


def prepared(args: argparse.Namespace, clips: ClipSet) -> Path:
    return args.work / f"latents-{clips.size}-{clips.frames}.safetensors"


def data_phases(args: argparse.Namespace, clips: ClipSet, seconds: int, seed: int, compiled: tuple[str, ...]) -> list[Phase]:
    """The encoders, unless there are latents of make.py; then latents and embedded captions in one file."""
    found = [] if args.latents else encoders(args, clips, seconds, seed, compiled)
    folder = (args.latents or args.work) / f"latents-{clips.size}-{clips.frames}"
    return found + [Phase(f"prepare {clips.size}x{clips.frames}", finetune(
        "prepare", "--model", MODEL, "--recipe-latents", folder, "--at-most", clips.clips, "--out", prepared(args, clips)), 25,
        tuple(phase.name for phase in found), clips.gpus[0], beside=True)]


@dataclass(frozen=True)
class Drawn:
    """Clips of one kind of attention, for the table or for the curves."""

    name: str
    after: str  # the phase it waits for
    options: tuple
    gpu: int
    curve: bool = False  # fewer captions; drawn after what the table needs


def drawn(work: Path) -> list[Drawn]:
    def adapter(kind: str, share: float | None = None) -> tuple:
        folder = work / kind / "out" / (f"at-{share:g}" if share else "")
        return ("--adapter", folder / "attention" / f"{'sla' if kind == 'tiled' else kind}.safetensors")

    def untrained(topk: float) -> tuple:
        return ("--attention", "sla", "--topk", topk)

    found = [Drawn("dense", "", ("--attention", "dense"), 2), Drawn("sparse", "", untrained(0.05), 1),
             Drawn("sparse-salad", "", ("--attention", "salad", "--topk", 0.1), 2)]
    found += [Drawn(f"sparse-topk-{topk:g}", "draw sparse", untrained(topk), 2, True) for topk in TOPKS]
    found += [Drawn(kind, kind, adapter(kind), GPUS[kind]) for kind in KINDS]
    found += [Drawn(f"{kind}-at-{share:g}", f"draw {kind}", adapter(kind, share), GPUS[kind], True)
              for kind in SHIPPED for share in SNAPSHOTS]
    return found + [Drawn(f"sla-topk-{topk:g}", "draw sla", (*adapter("sla"), "--topk", topk), i % 2, True)
                    for i, topk in enumerate(TOPKS)]


def table_phases(args: argparse.Namespace, sizes: Sizes) -> list[Phase]:
    """Clips of every kind, the table, and the curves of quality over sparsity and over steps."""
    work, found, home = args.work, [], sizes.sets[0]
    for one in drawn(work):
        found.append(Phase(f"draw {one.name}", finetune(
            "sample", "--model", MODEL, "--captions", work / f"captions{'-curve' if one.curve else ''}.json", "--raw", "--out",
            work / "drawn" / one.name, "--size", f"{home.size}x{home.size}", "--frames", home.frames, *sizes.sampling,
            *one.options), 15, (one.after,) if one.after else (), one.gpu, beside=True))
    quality = [sys.executable, str(TESTS / "quality.py")]
    jobs = ("--jobs", str(args.jobs))
    kinds = drawn(work)
    for name, chosen, count in (
            ("first table", [one for one in kinds if not one.curve and one.name not in ("tiled", "linear")], args.table),
            ("table", [one for one in kinds if not one.curve], args.table), ("curves", kinds, curve_count(args))):
        clips = [f"{one.name}=clips@{work / 'drawn' / one.name}" for one in chosen]
        found.append(Phase(name, [*quality, str(work / name.replace(" ", "-")), *clips, "--count", str(count), *jobs], 15,
                           tuple(f"draw {one.name}" for one in chosen), beside=True,
                           environment={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}))
    return found


def curve_count(args: argparse.Namespace) -> int:
    return min(args.table, 100)


def phases_of(args: argparse.Namespace) -> list[Phase]:
    sizes, work = TINY if args.tiny else Sizes(), args.work
    found = [phase for clips in sizes.sets for phase in data_phases(args, clips, sizes.seconds, 77, sizes.compile)]
    ready = tuple(phase.name for phase in found if phase.name.startswith("prepare"))
    plan = ("--data", *(prepared(args, clips) for clips in sizes.sets), "--batch", *(clips.batch for clips in sizes.sets), "--turns", *(clips.turns for clips in sizes.sets))
    steps = args.steps or sizes.steps
    length = ("--steps", steps) if steps else ("--minutes", args.adapter_minutes)
    for name in KINDS if args.table else args.kinds:
        found.append(Phase(name, finetune(
            "train", "--model", MODEL, "--work", work / name, "--out", work / name / "out", *plan, *KINDS[name], *TRAINING,
            *sizes.compile, *length), 60, ready, GPUS[name], name not in SHIPPED,
            environment={"SLALOM_ATTENTION_LIBRARY": "none"} if name in args.plain else {}))
    if args.table:
        found += table_phases(args, sizes)
    for phase in found:
        phase.least *= sizes.least
    return found


def draw_curves(args: argparse.Namespace, home: ClipSet) -> None:
    """Accuracy and likeness to the dense clips, over sparsity and over steps, from what the phase `curves` found."""
    sys.path.insert(0, str(TESTS))
    from chart import line_chart
    results = json.loads((args.work / "curves" / "table.json").read_text())
    blocks = -(-((home.frames - 1) // 4 + 1) * (home.size // 16) ** 2 // 64)
    steps = {kind: json.loads((args.work / kind / "log.jsonl").read_text().splitlines()[-1])["step"] for kind in SHIPPED}

    def sparsity(topk: float) -> float:
        return 100 * (1 - max(1, int(topk * blocks)) / blocks)

    lines = {"sparsity": {name: [(sparsity(0.05), first), *((sparsity(topk), f"{first}-topk-{topk:g}") for topk in TOPKS)]
                          for name, first in (("SLA", "sla"), ("untrained", "sparse"))},
             "steps": {kind.upper(): [(0, "sparse" if kind == "sla" else "sparse-salad"), (steps[kind], kind),
                                      *((share * steps[kind], f"{kind}-at-{share:g}") for share in SNAPSHOTS)]
                       for kind in SHIPPED}}
    for what, key, factor, unit in (("accuracy", "all", 100, "colour, shape and motion right, %"), ("psnr", "psnr", 1, "dB")):
        for x, series in lines.items():
            dense = {"dense": [(place, 100 * results["dense"]["all"]) for place in (min(p for s in series.values() for p, _ in s),
                               max(p for s in series.values() for p, _ in s))]} if key == "all" else {}
            points = {name: [(place, factor * results[row][key]) for place, row in rows if key in results.get(row, {})]
                      for name, rows in series.items()}
            line_chart(args.out / f"{what}-{x}.svg", f"{unit} over {x}", "sparsity, %" if x == "sparsity" else x, unit,
                       {name: some for name, some in (points | dense).items() if some})


def pack(args: argparse.Namespace, call: Call, phases: list[Phase]) -> None:
    """Puts what there is so far into --out."""
    args.out.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        made = args.work / phase.name / "out"
        for file in sorted(made.glob("**/attention/*.safetensors")):
            step = file.parents[1].relative_to(made)
            shipped = str(step) == "." and phase.name in SHIPPED
            folder = args.out / ("." if shipped else Path(phase.name) / step) / "attention"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
        if (args.work / phase.name / "log.jsonl").exists():
            shutil.copy(args.work / phase.name / "log.jsonl", args.out / f"losses-{phase.name}.jsonl")
    for name in ("first-table", "table", "curves"):
        for file in (args.work / name).glob("table.*"):
            shutil.copy(file, args.out / f"{name}{file.suffix}")
    if call.is_done("curves"):
        draw_curves(args, (TINY if args.tiny else Sizes()).sets[0])
    (args.out / "report.txt").write_text(call.report(phases))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_call_arguments(parser)
    parser.add_argument("--adapter-minutes", type=float, default=3.5, help="of training, for each adapter")
    parser.add_argument("--steps", type=int, help="of each adapter, instead of the minutes")
    parser.add_argument("--latents", type=Path, help="make.py's --work, whose latents do as well")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=SHIPPED)
    parser.add_argument("--plain", nargs="*", default=[], help="adapters trained without the attention library")
    parser.add_argument("--table", type=int, default=0, metavar="N", help="captions of the quality table")
    parser.add_argument("--jobs", type=int, default=4, help="processes that judge clips")
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.work = args.work.resolve()
    call, phases = Call(args.work, args.minutes, args.gpus), phases_of(args)
    write_captions(args.work / "captions.json", args.table, ".mp4")
    write_captions(args.work / "captions-curve.json", curve_count(args), ".mp4")
    status = call.run(phases)
    pack(args, call, phases)
    print("\n".join(call.table), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
