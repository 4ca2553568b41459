"""The demo model's adapters, phase by phase: latents of rendered clips, SLA and SALAD, each against the dense model
as its teacher, then the quality table.

    python make_adapters.py --work /tmp/adapters --out out --minutes 27 --gpus 0 1 --table 200 --tail 280

Ends within --minutes.  Called again with the same --work it goes on where it stopped; exit status 0 says that everything
is done, 3 that another call is needed.  Training ends by the clock (--adapter-minutes), --tail seconds before the end of
the call at the latest; --start goes on from adapters that are there, if their ranks are those of KINDS.  --out gets
attention/*.safetensors for the model folder, {sla,salad}/at-SHARE/attention/ and report.txt, on the way and after every call.
--table N adds the yardsticks, trained for a shorter time (the linear branch alone, and SLA with its tokens in raster order and
in boxes), and draws N captions that training never saw with every kind, in PyTorch, from slalomd's noise; tests/demo/quality.py
judges them as they come, and --out gets table.md (with --compare NAME=FILE more adapters in it), large.md (the second size)
and, from fewer captions but more sparsities and steps, curves.md and its pictures.  --tiny makes everything very small and
short, on a CPU too (TRITON_INTERPRET=1): a smoke run, whose adapters are good for nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
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

    sets: tuple[ClipSet, ...] = (ClipSet(256, 33, 12_288, 16, (0,), 16, 5), ClipSet(384, 49, 2_048, 4, (0,), 4, 1))
    seconds: int = 100  # of rendering and encoding
    compile: tuple[str, ...] = ("--compile",)
    steps: int | None = None  # instead of the minutes
    sampling: tuple[str, ...] = ("--batch", "50")
    large: int = 48  # captions at the second size
    least: float = 1.0  # factor on the seconds a phase needs at least


TINY = Sizes((ClipSet(32, 9, 4, 2, (0,), 2, 2), ClipSet(48, 13, 4, 2, (0,), 1, 1)), 240, (),
             6, ("--steps", "2", "--batch", "2"), 2, 0.2)

# 144 blocks of 16 tokens at 256x256x33: SLA keeps seven (95.1 % sparse), SALAD fourteen (90.3 %).  One block of 64, of 36, is
# 97.2 %, and far worse: without training the guided velocity's error against the dense one's is 2.45 of its square in raster
# order and 1.33 in boxes of 8x1x8 tokens; seven blocks of 16 in boxes of 2x1x8 come to 0.37, fourteen (as SALAD) to 0.28.
BLOCK = 16  # tokens
BLOCKS = ("--block-q", BLOCK, "--block-k", BLOCK)
TILE = ("--tile", "2,1,8")
TOPK = {"sla": 0.05, "salad": 0.1}
SLA = ("--attention", "sla", "--topk", TOPK["sla"], "--negligible", 0.1, "--scope", "marginal", *BLOCKS, "--rank", 64)
KINDS = {"sla": (*SLA, *TILE), "salad": ("--attention", "salad", "--topk", TOPK["salad"], *BLOCKS, *TILE, "--rank", 40),
         "linear": ("--attention", "sla", "--topk", 0, "--scope", "all", "--rank", 64),
         "sla-boxes": (*SLA, *TILE), "sla-raster": SLA}
SHIPPED = ("sla", "salad")
GPUS = {"sla": 0, "salad": 1, "linear": 1, "sla-boxes": 1, "sla-raster": 1}
TOPKS = (0.02, 0.05, 0.1, 0.25, 0.5)  # of the curves, beside what each kind was trained with
SNAPSHOTS = (0.02, 0.1, 0.4, 0.7)  # of the steps
TRAINING = ("--train", "lora", "--lora-on", "all", "--loss", "teacher", "--block-loss", 0.25, "--guided-loss", 0.3, "--path-weights",
            "--trajectories", 0.75, "--noise-levels", "uniform", "--rate", 1.5e-3, "--base-rate", 1e-3, "--warmup", 200, "--average",
            0.999, "--no-deterministic", "--save-seconds", 25)


def sizes_of(args: argparse.Namespace) -> Sizes:
    return TINY if args.tiny else Sizes()


def finetune(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "slalom_finetune", *map(str, arguments)]


def write_captions(file: Path, count: int, suffix: str) -> None:
    """Captions of scenes that training never saw, and what their clips must show."""
    sys.path.insert(0, str(TESTS))
    from captions import clips_to_make
    clips = [{**clip, "file": clip["file"].replace(".mp4", suffix)} for clip in clips_to_make(count, 1, held_out=True)]
    file.write_text(json.dumps(clips))


def encoders(args: argparse.Namespace, clips: ClipSet, seconds: int, seed: int) -> list[Phase]:
    """Into one folder of latents, from several GPUs if there are any."""
    vae = MODEL / "vae" / "diffusion_pytorch_model.safetensors"
    gpus = clips.gpus if len(args.gpus) > 1 else clips.gpus[:1]
    return [Phase(f"latents {clips.size}x{clips.frames} {i + 1}", script(
        "latents.py", "--vocabulary", MODEL / "tokenizer" / "spiece.model", "--workers", args.workers, "--vae", vae, "--out",
        args.work / f"latents-{clips.size}-{clips.frames}", "--size", clips.size, "--frames", clips.frames, "--clips",
        clips.clips, "--seconds", seconds, "--batch", clips.chunk, "--seed", seed + 1000 * i), seconds + 30,
        gpu=gpu, beside=True) for i, gpu in enumerate(gpus)]


def prepared(args: argparse.Namespace, clips: ClipSet) -> Path:
    return args.work / f"latents-{clips.size}-{clips.frames}.safetensors"


def data_phases(args: argparse.Namespace, clips: ClipSet, seconds: int, seed: int) -> list[Phase]:
    """The encoders, unless there are latents of make.py; then latents and embedded captions in one file."""
    found = [] if args.latents else encoders(args, clips, seconds, seed)
    folder = (args.latents or args.work) / f"latents-{clips.size}-{clips.frames}"
    return found + [Phase(f"prepare {clips.size}x{clips.frames}", finetune(
        "prepare", "--model", MODEL, "--recipe-latents", folder, "--at-most", clips.clips, "--out", prepared(args, clips)), 25,
        tuple(phase.name for phase in found), clips.gpus[0], beside=True)]


@dataclass(frozen=True)
class Drawn:
    """Clips of one kind of attention, for some of the tables."""

    name: str
    after: str  # the phase it waits for; "": latents of captions are all it needs
    options: tuple
    gpu: int
    where: str = "table"  # or "curves": fewer captions; or "large": the second size
    dense: str = "dense"  # what it is compared with
    needs: tuple[Path, ...] = ()  # files

    @property
    def captions(self) -> str:
        return f"captions-{self.where}.json"


def adapter_file(args: argparse.Namespace, kind: str, share: float | None = None) -> Path:
    folder = args.work / kind / "out" / (f"at-{share:g}" if share else "")
    return folder / "attention" / f"{kind.split('-')[0]}.safetensors"


def drawn(args: argparse.Namespace) -> list[Drawn]:
    """In the order in which each GPU draws them."""
    def untrained(kind: str, topk: float) -> tuple:
        return ("--attention", kind, "--topk", topk, *BLOCKS, *TILE)

    dense = ("--attention", "dense")
    found = [Drawn("dense", "", dense, 1), Drawn("sparse", "", untrained("sla", TOPK["sla"]), 1),
             Drawn("sparse-salad", "", untrained("salad", TOPK["salad"]), 1)]
    found += [Drawn(name, "", ("--adapter", file), 1) for name, file in args.compare]
    found += [Drawn("dense-large", "", dense, 1, "large", "dense-large")]
    found += [Drawn(kind, kind, ("--adapter", adapter_file(args, kind)), GPUS[kind]) for kind in KINDS]
    found += [Drawn(f"{kind}-large", kind, ("--adapter", adapter_file(args, kind)), GPUS[kind], "large", "dense-large") for kind in SHIPPED]
    found += [Drawn(f"sparse-topk-{topk:g}", "", untrained("sla", topk), 1, "curves") for topk in TOPKS if topk != TOPK["sla"]]
    for kind, share in ((kind, share) for share in SNAPSHOTS for kind in SHIPPED):
        file = adapter_file(args, kind, share)
        found.append(Drawn(f"{kind}-at-{share:g}", "", ("--adapter", file), 1, "curves", needs=(file,)))
    return found + [Drawn(f"{kind}-topk-{topk:g}", kind, ("--adapter", adapter_file(args, kind), "--topk", topk), i % 2, "curves")
                    for kind in SHIPPED for i, topk in enumerate(TOPKS) if topk != TOPK[kind]]


def count_of(args: argparse.Namespace, where: str) -> int:
    return {"table": args.table, "curves": min(args.table, 64), "large": min(args.table, sizes_of(args).large)}[where]


def rows_of(kinds: list[Drawn], where: str) -> list[Drawn]:
    """Of one table.  The curves go on from the rows of `table`."""
    return [one for one in kinds if one.where == where or where == "curves" and one.where == "table"]


def judging(args: argparse.Namespace, name: str, rows: list[Drawn], count: int, after: tuple[str, ...], jobs: int, lane: str = "") -> Phase:
    clips = [f"{one.name}=clips@{args.work / 'drawn' / one.name}" for one in rows]
    return Phase(name, [sys.executable, str(TESTS / "quality.py"), str(args.work / name.replace(" ", "-")), *clips, "--count", str(count),
                        "--jobs", str(jobs)], 5, after, beside=True, lane=lane,
                 environment={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})


def table_phases(args: argparse.Namespace, sizes: Sizes, ready: tuple[str, ...]) -> list[Phase]:
    """Clips of every kind, judged as they come; then the tables, and the curves of quality over sparsity and over steps."""
    work, found, kinds = args.work, [], drawn(args)
    by_name = {one.name: one for one in kinds}
    for one in kinds:
        size = sizes.sets[one.where == "large"]
        sampling = ("--batch", size.batch * 3) if one.where == "large" and not args.tiny else sizes.sampling
        found.append(Phase(f"draw {one.name}", finetune(
            "sample", "--model", MODEL, "--captions", work / one.captions, "--raw", "--out", work / "drawn" / one.name, "--size",
            f"{size.size}x{size.size}", "--frames", size.frames, *sampling, *one.options), 10,
            (one.after,) if one.after else ready, one.gpu, beside=True, needs=one.needs, lane=f"draw {one.gpu}"))
        first = by_name[one.dense]
        rows = [first] if one is first else [first, one]
        found.append(judging(args, f"judge {one.name}", rows, count_of(args, one.where),
                             (f"draw {one.name}", *(f"judge {row.name}" for row in rows[:-1])), args.jobs, f"judge {one.gpu}"))
    for where in ("table", "large", "curves"):
        rows = rows_of(kinds, where)
        found.append(judging(args, where, rows, count_of(args, where), tuple(f"judge {one.name}" for one in rows), args.jobs))
    return found


def summary(args: argparse.Namespace) -> None:
    """The tables of what could be drawn, when the time was over before all was."""
    for where in ("table", "large", "curves"):
        rows = [one for one in rows_of(drawn(args), where) if any((args.work / "drawn" / one.name).glob(".judged-*"))]
        if rows and not (args.work / "log" / f"{where}.done").exists():
            try:
                subprocess.run(judging(args, where, rows, count_of(args, where), (), args.jobs).command, timeout=15, check=False)
            except subprocess.TimeoutExpired:
                print(f"no time for the table {where}", flush=True)


def phases_of(args: argparse.Namespace) -> list[Phase]:
    sizes, work = sizes_of(args), args.work
    found = [phase for clips in sizes.sets for phase in data_phases(args, clips, sizes.seconds, args.seed)]
    ready = tuple(phase.name for phase in found if phase.name.startswith("prepare"))
    plan = ("--data", *(prepared(args, clips) for clips in sizes.sets), "--batch", *(clips.batch for clips in sizes.sets),
            "--turns", *(clips.turns for clips in sizes.sets), "--seed", args.seed)
    steps = args.steps or sizes.steps
    for name in KINDS if args.table else args.kinds:
        shipped = name in SHIPPED
        minutes = args.adapter_minutes if shipped else args.yardstick_minutes
        length = ("--steps", steps) if steps else ("--clock-minutes", minutes)
        more = ("--snapshots", *SNAPSHOTS) if shipped else ()
        more += ("--start", args.start / f"{name}.safetensors") if args.start and shipped else ()
        found.append(Phase(name, finetune(
            "train", "--model", MODEL, "--work", work / name, "--out", work / name / "out", *plan, *KINDS[name], *TRAINING,
            *sizes.compile, *length, *more), 60, ready, GPUS[name], beside=True, tail=args.tail,
            environment={"SLALOM_ATTENTION_LIBRARY": "none"} if name in args.plain else {}))
    if args.table:
        found += table_phases(args, sizes, ready)
    for phase in found:
        phase.least *= sizes.least
        if phase.gpu and args.second_gpu_after:
            phase.needs += (args.second_gpu_after,)
    return found


def draw_curves(args: argparse.Namespace, home: ClipSet) -> None:
    """Accuracy and likeness to the dense clips, over sparsity and over steps, of those that the phase `curves` has found yet."""
    sys.path.insert(0, str(TESTS))
    from chart import line_chart
    results = json.loads((args.work / "curves" / "table.json").read_text())
    dense = results.get("dense", {})
    blocks = -(-((home.frames - 1) // 4 + 1) * (home.size // 16) ** 2 // BLOCK)
    before = args.steps_before

    def steps(kind: str, share: float | None = None) -> int:
        """Behind an adapter: what shares of the time are in steps depends on what else the GPU did."""
        with adapter_file(args, kind, share).open("rb") as file:  # safetensors: the header's length, the header
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return before + json.loads(header["__metadata__"]["slalom.finetune"])["steps_done"]

    def sparsity(topk: float) -> float:
        return 100 * (1 - max(1, int(topk * blocks)) / blocks)

    lines = {"sparsity": {name: [(sparsity(TOPK[kind]), first), *((sparsity(topk), f"{first}-topk-{topk:g}") for topk in TOPKS)]
                          for name, kind, first in (("SLA", "sla", "sla"), ("SALAD", "salad", "salad"), ("untrained", "sla", "sparse"))},
             "steps": {kind.upper(): [(0, "sparse" if kind == "sla" else "sparse-salad"), (steps(kind), kind),
                                      *((steps(kind, share), f"{kind}-at-{share:g}") for share in SNAPSHOTS
                                        if adapter_file(args, kind, share).exists())]
                       for kind in SHIPPED if adapter_file(args, kind).exists()}}
    for what, key, factor, unit in (("accuracy", "all", 100, "colour, shape and motion right, %"),
                                    ("subject", "subject", 100, "subject consistency, %"), ("psnr", "psnr", 1, "PSNR to the dense clips, dB")):
        for x, series in lines.items():
            points = {name: [(place, factor * results[row][key]) for place, row in rows if key in results.get(row, {})]
                      for name, rows in series.items()}
            points = {name: some for name, some in points.items() if some}
            places = [place for some in points.values() for place, _ in some]
            if not places:
                continue
            level = {"dense": [(place, factor * dense[key]) for place in (min(places), max(places))]} if key in dense else {}
            line_chart(args.out / f"{what}-{x}.svg", f"{unit} over {x}", "sparsity, %" if x == "sparsity" else x, unit, points | level)


def pack(args: argparse.Namespace, call: Call, phases: list[Phase]) -> None:
    """Puts what there is so far, and new, into --out."""
    def copy(file: Path, target: Path) -> None:
        if not target.exists() or target.stat().st_mtime_ns < file.stat().st_mtime_ns:
            shutil.copy2(file, target)

    args.out.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        made = args.work / phase.name / "out"
        for file in sorted(made.glob("**/attention/*.safetensors")):
            step = file.parents[1].relative_to(made)
            shipped = str(step) == "." and phase.name in SHIPPED
            folder = args.out / ("." if shipped else Path(phase.name) / step) / "attention"
            folder.mkdir(parents=True, exist_ok=True)
            copy(file, folder / file.name)
        if (args.work / phase.name / "log.jsonl").exists():
            copy(args.work / phase.name / "log.jsonl", args.out / f"losses-{phase.name}.jsonl")
    for name in ("table", "large", "curves"):
        for file in (args.work / name).glob("table.*"):
            copy(file, args.out / f"{name}{file.suffix}")
    (args.out / "report.txt").write_text(call.report(phases))
    if (args.work / "curves" / "table.json").exists():
        draw_curves(args, sizes_of(args).sets[0])


def pack_on_the_way(args: argparse.Namespace, call: Call, phases: list[Phase]) -> None:
    """Files that are just being written must not end the call."""
    try:
        pack(args, call, phases)
    except (OSError, ValueError, LookupError) as error:
        print(f"not packed: {error!r}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_call_arguments(parser)
    parser.add_argument("--adapter-minutes", type=float, default=7.0, help="of training, by the clock, for each shipped adapter")
    parser.add_argument("--yardstick-minutes", type=float, default=2.0, help="the same, for each of those that are not")
    parser.add_argument("--second-gpu-after", type=Path, metavar="FILE", help="which is not there before the second GPU is free")
    parser.add_argument("--start", type=Path, help="folder of {sla,salad}.safetensors to go on from")
    parser.add_argument("--steps-before", type=int, default=0, help="that those have behind them, for the curves")
    parser.add_argument("--compare", nargs="*", default=[], type=lambda text: text.split("=", 1), metavar="NAME=FILE",
                        help="more adapters for the table")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--tail", type=float, default=0, help="seconds of the call that training leaves to the tables")
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
    for where in ("table", "curves", "large"):
        write_captions(args.work / f"captions-{where}.json", count_of(args, where), ".mp4")
    status = call.run(phases, lambda: pack_on_the_way(args, call, phases))
    if args.table:
        summary(args)
    pack(args, call, phases)
    print("\n".join(call.table), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
