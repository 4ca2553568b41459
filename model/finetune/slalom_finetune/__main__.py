"""python -m slalom_finetune prepare | train | convert | sample

    prepare   clips with captions -> latents.safetensors
    train     a Wan2.1 folder and latents -> an adapter that slalomd loads
    convert   a TurboDiffusion checkpoint (.pth) -> safetensors
    sample    draws clips with an adapter, in PyTorch
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits twice, see --deterministic

import torch  # noqa: E402

from .convert import convert  # noqa: E402
from .deadline import Deadline  # noqa: E402
from .files import write_atomically  # noqa: E402
from .options import FEATURE_MAPS, GATES, MAPS, SCOPES, AttentionOptions  # noqa: E402
from .prepare import from_recipe, prepare  # noqa: E402
from .sample import add_sample_arguments, run_sample  # noqa: E402
from .train import Places, Plan, Trainer  # noqa: E402


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.lower().replace("x", ",").split(","))


def _shares(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("prepare", help="clips with captions -> latents.safetensors")
    parser.add_argument("--model", type=Path, required=True, help="Wan2.1 folder in the diffusers layout")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clips", type=Path, help='JSON list of {"file", "caption"}')
    source.add_argument("--recipe-latents", type=Path, help="folder of model/demo/recipe/latents.py")
    parser.add_argument("--at-most", type=int, default=1 << 40, help="clips of --recipe-latents")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", type=_sizes, default=(832, 480), help="WIDTHxHEIGHT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline-seconds", type=float)
    parser.add_argument("--device")


def _add_attention(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attention; what is left out is the paper's")
    group.add_argument("--attention", choices=("sla", "salad"), default="sla")
    group.add_argument("--topk", type=float, help="share of key blocks in the softmax; 0: SLA's linear branch alone")
    group.add_argument("--layer-topk", type=_shares, help="instead: each layer's own, as 0.1,0.05,0.05")
    group.add_argument("--negligible", type=float)
    group.add_argument("--scope", choices=SCOPES)
    group.add_argument("--feature-map", choices=FEATURE_MAPS)
    group.add_argument("--block-q", type=int)
    group.add_argument("--block-k", type=int)
    group.add_argument("--map", choices=MAPS)
    group.add_argument("--gate", choices=GATES)
    group.add_argument("--dropped-layers", type=_sizes)
    group.add_argument("--tile", type=_sizes, help="token order: boxes of FRAMES,ROWS,COLUMNS tokens, as 4,4,4")


_ATTENTION = ("topk", "layer_topk", "negligible", "scope", "feature_map", "block_q", "block_k", "map", "gate", "dropped_layers", "tile")


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="a Wan2.1 folder and latents -> an adapter")
    parser.add_argument("--model", type=Path, required=True, help="Wan2.1 folder in the diffusers layout")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="of prepare; several sizes take turns")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint and log; called again, the run goes on")
    parser.add_argument("--out", type=Path, required=True, help="gets attention/{sla,salad}.safetensors")
    _add_attention(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--train", choices=("proj", "lora", "all"), default=Plan.train)
    group.add_argument("--rank", type=int, default=Plan.rank)
    group.add_argument("--lora-on", choices=("self", "all"), default=Plan.lora_on, help="self-attention's q, k, v, o; or "
                       "cross-attention's q, o and the MLP too")
    group.add_argument("--start", type=Path, help="an adapter to go on from")
    group.add_argument("--loss", choices=("diffusion", "teacher"), default=Plan.loss)
    group.add_argument("--block-loss", type=float, default=Plan.block_loss)
    group.add_argument("--guided-loss", type=float, default=Plan.guided_loss, help="teacher: weight of the guided velocity's "
                       "error; clips then go through with their caption and without, so --drop-text says nothing")
    group.add_argument("--guidance", type=float, default=Plan.guidance)
    group.add_argument("--trajectories", type=float, default=Plan.trajectories, help="guided: share of a batch that stands "
                       "on the sampler's own way from noise to clip, half led by the teacher, half by the student")
    group.add_argument("--sampler-steps", type=int, default=Plan.sampler_steps)
    group.add_argument("--path-weights", action="store_true", help="teacher: errors count as much as the sampler's steps are "
                       "long where they are made, more where there is little noise")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=Plan.steps)
    length.add_argument("--minutes", type=float, help="as many steps as fit, measured once, at the start")
    length.add_argument("--clock-minutes", type=float, default=Plan.minutes, help="ends and lets the rates fall by the "
                        "clock, before the deadline: where other work shares the machine; no two runs are then the same")
    group.add_argument("--batch", type=int, nargs="+", default=list(Plan.batches), help="one for each data file")
    group.add_argument("--turns", type=int, nargs="+", default=[], help="steps of each data file in its turn")
    group.add_argument("--rate", type=float, default=Plan.rate, help="of new parameters")
    group.add_argument("--base-rate", type=float, default=Plan.base_rate, help="of LoRA and base weights")
    group.add_argument("--warmup", type=int, default=Plan.warmup)
    group.add_argument("--average", type=float, default=Plan.average)
    group.add_argument("--shift", type=float, default=Plan.shift)
    group.add_argument("--noise-levels", choices=("logit-normal", "uniform"), default=Plan.noise_levels)
    group.add_argument("--drop-text", type=float, default=Plan.drop_text)
    group.add_argument("--seed", type=int, default=Plan.seed)
    group.add_argument("--precision", choices=("f32", "bf16"), help="default: bf16 on a GPU")
    group = parser.add_argument_group("running")
    group.add_argument("--deadline-seconds", type=float, help="ends before, with status 3, to go on in the next call")
    group.add_argument("--save-seconds", type=float, default=60.0)
    group.add_argument("--snapshots", type=float, nargs="*", default=[], help="also writes the adapter at these shares "
                       "of the steps")
    group.add_argument("--compile", action="store_true")
    group.add_argument("--recompute", action="store_true", help="less memory: blocks are computed again for gradients")
    group.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--device")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="a TurboDiffusion checkpoint -> safetensors")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--topk", type=float, default=0.1)
    parser.add_argument("--block-q", type=int, default=128)
    parser.add_argument("--block-k", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=128)


def plan_of(args: argparse.Namespace, device: torch.device) -> Plan:
    given = {name: getattr(args, name) for name in _ATTENTION if getattr(args, name) is not None}
    batches = args.batch * len(args.data) if len(args.batch) == 1 else args.batch
    if len(batches) != len(args.data):
        raise SystemExit("--batch takes one number, or one for each data file")
    if args.turns and (len(args.turns) != len(args.data) or min(args.turns) < 1):
        raise SystemExit("--turns takes one positive number for each data file")
    low = args.precision == "bf16" if args.precision else device.type == "cuda"
    if args.guided_loss and args.loss != "teacher" or args.trajectories and not args.guided_loss:
        raise SystemExit("--trajectories needs --guided-loss, and that needs --loss teacher")
    own = ("train", "rank", "lora_on", "loss", "block_loss", "guided_loss", "guidance", "trajectories", "sampler_steps", "path_weights", "steps",
           "rate", "base_rate", "warmup", "average", "shift", "noise_levels", "drop_text", "seed")
    start = hashlib.sha256(args.start.read_bytes()).hexdigest() if args.start else ""
    return Plan(AttentionOptions.for_kind(args.attention, **given), batches=tuple(batches), turns=tuple(args.turns), low_precision=low,
                minutes=args.clock_minutes, start=start, **{name: getattr(args, name) for name in own})


def _with_steps(plan: Plan, places: Places, minutes: float) -> Plan:
    """As many steps as fit into `minutes`; the number is kept in the work folder, for the runs that go on."""
    file = places.work / "steps.json"
    if not file.exists():
        steps = max(int(60 * minutes / Trainer(plan, places).pace()), 1)
        write_atomically(file, lambda part: part.write_text(json.dumps(steps)) and None)
    return Plan(**{**{f: getattr(plan, f) for f in asdict(plan)}, "steps": json.loads(file.read_text())})


def run_train(args: argparse.Namespace) -> int:
    deadline, device = Deadline(args.deadline_seconds), _device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    plan = plan_of(args, device)
    places = Places(args.model, args.data, args.work, args.out, args.save_seconds, snapshots=tuple(args.snapshots), compile=args.compile,
                    recompute=args.recompute, start=args.start, device=device)
    if args.minutes:
        plan = _with_steps(plan, places, args.minutes)
    return Trainer(plan, places).run(deadline)


def main() -> int:
    parser = argparse.ArgumentParser(prog="slalom_finetune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_prepare(commands)
    _add_train(commands)
    _add_convert(commands)
    add_sample_arguments(commands)
    args = parser.parse_args()
    if args.command == "train":
        return run_train(args)
    if args.command == "convert":
        written = convert(args.checkpoint, args.out, args.topk, args.block_q, args.block_k, args.head_dim)
        print("wrote", *written)
    elif args.command == "prepare":
        Deadline(args.deadline_seconds)
        device = _device(args.device)
        width, height = args.size
        made = (from_recipe(args.model, args.recipe_latents, device, args.at_most) if args.recipe_latents
                else prepare(args.model, args.clips, args.frames, height, width, device))
        made.save(args.out)
        print(f"{len(made.latents)} clips of latent size {tuple(made.latents.shape[1:])} in {args.out}")
    else:
        return run_sample(args, _device(args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
