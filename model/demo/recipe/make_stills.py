"""A side look at images (SLA's second experiment): stills of one latent frame at 87.5 % sparsity.

    python make_stills.py --work /tmp/stills --out out --minutes 9

The demo model learns stills (all weights, every block critical, so dense), then SLA and the linear branch alone
learn from it; the reader of tests/demo judges colour and shape of stills for held-out captions.  256x256 is 256
tokens: with blocks of 32, one critical block of eight.  Ends within --minutes and goes on in the next call, like
make_adapters.py; --out gets stills.md, the adapters and report.txt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from make import HERE, Phase, script
from make_adapters import MODEL, TRAINING, finetune, run_phases

TESTS = HERE.parents[2] / "tests" / "demo"
BLOCKS = ("--block-q", 32, "--block-k", 32)
SPARSE = ("--attention", "sla", "--topk", 0.125, "--negligible", 0.1, *BLOCKS)
LINEAR = ("--attention", "sla", "--topk", 0, "--scope", "all")
EVERYTHING = ("--attention", "sla", "--topk", 1, "--negligible", 0, *BLOCKS)  # dense, by another name


def write_captions(file: Path, count: int) -> None:
    sys.path.insert(0, str(TESTS))
    from captions import clips_to_make
    clips = [{**clip, "file": clip["file"].replace(".mp4", ".png")} for clip in clips_to_make(count, 1, held_out=True)]
    file.write_text(json.dumps(clips))


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
    size, clips, batch = (64, 4, 2) if args.tiny else (256, 24_576, 256)
    length = ("--steps", 6) if args.tiny else ("--minutes", args.adapter_minutes)
    compiled = () if args.tiny else ("--compile",)
    data = work / "latents.safetensors"
    vae = MODEL / "vae" / "diffusion_pytorch_model.safetensors"

    def train(name: str, model: Path, *options: object) -> Phase:
        return Phase(name, finetune("train", "--model", model, "--data", data, "--work", work / name, "--out",
                                    work / name / "out", "--batch", batch, *compiled, *length, *options), 60)

    def draw(name: str, *options: object) -> Phase:
        return Phase(f"draw {name}", finetune(
            "sample", "--model", stills, "--captions", work / "captions.json", "--out", work / "drawn" / name, "--size",
            f"{size}x{size}", "--frames", 1, "--batch", 64, *(("--steps", 4) if args.tiny else ()), *options), 20)

    found = [
        Phase("latents", script("latents.py", "--vocabulary", MODEL / "tokenizer" / "spiece.model", "--workers",
                                args.workers, "--vae", vae, "--out", work / "encoded.pt", "--size", size, "--frames", 1,
                                "--clips", clips, "--seconds", 60, "--batch", min(clips, 64), "--seed", 78, *compiled), 80),
        Phase("prepare", finetune("prepare", "--model", MODEL, "--recipe-latents", work / "encoded.pt", "--out", data), 25),
        train("dense", MODEL, *EVERYTHING, "--train", "all", "--base-rate", 5e-4),
        train("sla", stills, *SPARSE, *TRAINING), train("linear", stills, *LINEAR, *TRAINING),
        draw("dense", "--attention", "dense"),
        draw("sparse", "--adapter", work / "sla" / "out" / "untrained" / "sla.safetensors"),
        draw("linear", "--adapter", work / "linear" / "out" / "attention" / "linear.safetensors"),
        draw("sla", "--adapter", work / "sla" / "out" / "attention" / "sla.safetensors")]
    for phase in found:
        phase.least *= 0.2 if args.tiny else 1
    return found


def untrained(args: argparse.Namespace) -> None:
    """The SLA adapter with its training undone: pure sparse attention with the same blocks."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    trained = args.work / "sla" / "out" / "attention" / "sla.safetensors"
    if not trained.exists():
        return
    with safe_open(trained, "pt") as file:
        metadata = file.metadata()
    target = args.work / "sla" / "out" / "untrained" / "sla.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_file({name: value.zero_() for name, value in load_file(trained).items()}, target, metadata)


def report(args: argparse.Namespace) -> str:
    """The table, of what has been drawn."""
    from quality import judge
    clips, drawn = json.loads((args.work / "captions.json").read_text()), args.work / "drawn"
    lines = ["| attention | stills | colour | shape | PSNR | SSIM |", "|---|---|---|---|---|---|"]
    for name in ("dense", "sparse", "linear", "sla"):
        if (drawn / name).exists():
            row = judge(drawn / name, clips, None if name == "dense" else drawn / "dense")
            if row["clips"]:
                lines.append(f"| {name} | {row['clips']} | {100 * row['color']:.1f} % | {100 * row['shape']:.1f} % | "
                             f"{row.get('psnr', 0):.2f} | {row.get('ssim', 0):.3f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder kept from call to call")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of this call, everything included")
    parser.add_argument("--adapter-minutes", type=float, default=1.5, help="of each of the three trainings")
    parser.add_argument("--count", type=int, default=256, help="captions")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    write_captions(args.work / "captions.json", 4 if args.tiny else args.count)
    model_folder(args.work / "dense" / "out", args.work / "model")
    end, phases = time.time() + 60 * args.minutes, phases_of(args)
    drawing = [phase for phase in phases if phase.name.startswith("draw")]
    status, table = run_phases(args, [phase for phase in phases if phase not in drawing])
    if status == 0:
        untrained(args)
        args.minutes = (end - time.time()) / 60
        status, more = run_phases(args, drawing)
        table += more
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stills.md").write_text(report(args))
    for name in ("sla", "linear"):
        for file in (args.work / name / "out" / "attention").glob("*.safetensors"):
            shutil.copy(file, args.out)
    (args.out / "report.txt").write_text("\n".join(table) + "\n")
    print("\n".join(table), report(args), sep="\n", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
