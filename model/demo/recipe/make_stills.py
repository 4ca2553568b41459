"""A side look at images (SLA's second experiment): stills of one latent frame at 87.5 % sparsity.

    python make_stills.py --work /tmp/stills --out out --minutes 9

The demo model learns stills (all weights, every block critical, so dense), then SLA and the linear branch alone
learn from it; the reader of tests/demo judges colour and shape of stills for held-out captions.  256x256 is 256
tokens: with blocks of 16, two critical blocks of sixteen.  Ends within --minutes and goes on in the next call, like
make_adapters.py, side by side on several --gpus; --out gets stills.md, the adapters and report.txt.

    python make_stills.py --work /tmp/stills --out out --minutes 45 --data latents-256-1.safetensors --gpus 0 1 --eager \\
        --precision bf16 --batch 32 --dense-minutes 18 --adapter-batch 4 --adapter-minutes 6 --warmup 20 --count 40

does the same on a CPU, two scripts at a time, from latents that a call with a GPU left in its work folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from make_adapters import MODEL, TESTS, TRAINING, ClipSet, data_phases, finetune, write_captions
from phases import Call, Phase, add_call_arguments

BLOCKS = ("--block-q", 16, "--block-k", 16, "--tile", "1,2,8")
SPARSE = ("--attention", "sla", "--topk", 0.125, "--negligible", 0.1, *BLOCKS)
LINEAR = ("--attention", "sla", "--topk", 0, "--scope", "all")
# Dense, by another name: one block holds all tokens.
EVERYTHING = ("--attention", "sla", "--topk", 1, "--negligible", 0, "--block-q", 256, "--block-k", 256)


def model_folder(dense: Path, folder: Path) -> None:
    """The demo's networks, with the transformer that learnt stills."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "text_encoder", "tokenizer"):
        if not (folder / name).exists():
            (folder / name).symlink_to(MODEL / name)
    if not (folder / "transformer").exists():
        (folder / "transformer").symlink_to(dense / "transformer")


def phases_of(args: argparse.Namespace) -> list[Phase]:
    work, stills = args.work, args.work / "model"
    size, clips, batch, small = (64, 4, 2, 1) if args.tiny else (256, 24_576, args.batch, args.adapter_batch)
    common = (*(() if args.tiny or args.eager else ("--compile",)), *(("--precision", args.precision) if args.precision else ()))
    data, sla = args.data or work / f"latents-{size}-1.safetensors", work / "sla" / "out"
    training = (*TRAINING, "--warmup", args.warmup, "--rank", 64)

    def length(minutes: float) -> tuple:
        return ("--steps", 6) if args.tiny else ("--clock-minutes", minutes)

    def train(name: str, model: Path, after: tuple[str, ...], gpu: int, batch: int, *options: object) -> Phase:
        return Phase(name, finetune("train", "--model", model, "--data", data, "--work", work / name, "--out",
                                    work / name / "out", "--batch", batch, *common, *options), 60, after, gpu,
                     environment={"SLALOM_ATTENTION_LIBRARY": "none"})

    def draw(name: str, after: str, gpu: int, *options: object) -> Phase:
        return Phase(f"draw {name}", finetune(
            "sample", "--model", stills, "--captions", work / "captions.json", "--out", work / "drawn" / name, "--size",
            f"{size}x{size}", "--frames", 1, "--raw", "--batch", 64, *(("--steps", 4) if args.tiny else ()), *options), 20, (after,),
            gpu)

    stills_set = ClipSet(size, 1, clips, min(clips, 64), (0, 1), batch, 1)
    found = [] if args.data else data_phases(args, stills_set, 60, 78)
    ready, distilled = tuple(phase.name for phase in found[-1:]), length(args.adapter_minutes)
    found += [
        train("dense", MODEL, ready, 0, batch, *EVERYTHING, "--train", "all", "--base-rate", 5e-4, *length(args.dense_minutes)),
        train("sla", stills, ("dense",), 0, small, *SPARSE, *training, *distilled),
        train("linear", stills, ("dense",), 1, small, *LINEAR, *training, *distilled),
        draw("dense", "dense", 0, "--attention", "dense"),
        draw("linear", "linear", 1, "--adapter", work / "linear" / "out" / "attention" / "linear.safetensors"),
        Phase("untrained", [sys.executable, __file__, "--untrain", str(sla)], 5, ("sla",)),
        draw("sparse", "untrained", 0, "--adapter", sla / "untrained" / "sla.safetensors"),
        draw("sla", "sla", 1, "--adapter", sla / "attention" / "sla.safetensors")]
    for phase in found:
        phase.least *= 0.2 if args.tiny else 1
    return found


def untrain(out: Path) -> None:
    """The SLA adapter with its training undone: pure sparse attention with the same blocks."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    trained, target = out / "attention" / "sla.safetensors", out / "untrained" / "sla.safetensors"
    with safe_open(trained, "pt") as file:
        metadata = file.metadata()
    target.parent.mkdir(exist_ok=True)
    save_file({name: value.zero_() for name, value in load_file(trained).items()}, target, metadata)


def report(args: argparse.Namespace) -> str:
    """The table, of what has been drawn."""
    sys.path.insert(0, str(TESTS))
    from quality import judge
    clips, drawn = json.loads((args.work / "captions.json").read_text()), args.work / "drawn"
    lines = ["| attention | stills | colour | shape | PSNR | SSIM |", "|---|---|---|---|---|---|"]
    for name in ("dense", "sparse", "linear", "sla"):
        if (drawn / name).exists():
            row = judge(drawn / name, clips, None if name == "dense" else drawn / "dense")
            if row["clips"]:
                likeness = f"{row['psnr']:.2f} | {row['ssim']:.3f}" if "psnr" in row else " | "
                lines.append(f"| {name} | {row['clips']} | {100 * row['color']:.1f} % | {100 * row['shape']:.1f} % | {likeness} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    if sys.argv[1:2] == ["--untrain"]:
        untrain(Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_call_arguments(parser)
    parser.add_argument("--dense-minutes", type=float, default=1.5, help="in which the dense model learns stills")
    parser.add_argument("--adapter-minutes", type=float, default=1.5, help="of SLA, and of the linear branch alone")
    parser.add_argument("--batch", type=int, default=256, help="stills, of the dense model's training")
    parser.add_argument("--adapter-batch", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=200, help="steps, of the adapters")
    parser.add_argument("--precision", choices=("f32", "bf16"), help="of the trainings; default: bf16 on a GPU")
    parser.add_argument("--eager", action="store_true", help="without compilers")
    parser.add_argument("--count", type=int, default=256, help="captions")
    parser.add_argument("--latents", type=Path, help="a folder with latents-256-1 of latents.py, instead of new ones")
    parser.add_argument("--data", type=Path, help="the file that `slalom_finetune prepare` made of such a folder, instead")
    args = parser.parse_args()
    args.work = args.work.resolve()
    call, phases = Call(args.work, args.minutes, args.gpus), phases_of(args)
    write_captions(args.work / "captions.json", 4 if args.tiny else args.count, ".npy")
    model_folder(args.work / "dense" / "out", args.work / "model")
    status = call.run(phases)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stills.md").write_text(report(args))
    for name in ("sla", "linear"):
        for file in (args.work / name / "out" / "attention").glob("*.safetensors"):
            shutil.copy(file, args.out)
    (args.out / "report.txt").write_text(call.report(phases))
    print("\n".join(call.table), report(args), sep="\n", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
