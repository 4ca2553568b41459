#!/usr/bin/env python3
"""Times diffusers and transformers, eager and torch.compile, beside pipeline_bench in one run.

    tests/bench/peer_diffusers.py --bench build/cuda/tests/bench/pipeline_bench \
        --model /data/random-1.3b --out results.json

What it times, all in bf16, batch 1: one forward of the transformer, the VAE's decoding of a whole
clip, and 512 tokens through UMT5. The peers get random weights of the folder's own config files;
times don't depend on values. Without --bench only the peers run. Needs torch, diffusers and
transformers; what is missing is reported and left out.
"""

import argparse
import gc
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch

PARTS = ("text", "forward", "decode")


def timed(run, repeats, device):
    """Median and best seconds of `repeats` runs after two that warm up, and the peak beside before."""

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        for _ in range(2):
            run()
        wait()
        before = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
    result = {"median_seconds": statistics.median(seconds), "best_seconds": min(seconds)}
    if device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result


def read_config(folder, network):
    config = json.loads((Path(folder) / network / "config.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


def make_forward(args, latent_shape):
    from diffusers import WanTransformer3DModel

    config = read_config(args.model, "transformer")
    config.pop("text_len", None)
    with torch.device(args.device):
        model = WanTransformer3DModel(**config).to(torch.bfloat16).eval()
        latent = torch.randn(1, *latent_shape, dtype=torch.bfloat16)
        text = torch.randn(1, 512, config["text_dim"], dtype=torch.bfloat16)
        timestep = torch.tensor([500.0])

    def run(module):
        return module(latent, timestep, text, return_dict=False)

    return model, run


def make_decode(args, latent_shape):
    from diffusers import AutoencoderKLWan

    with torch.device(args.device):
        model = AutoencoderKLWan(**read_config(args.model, "vae")).to(torch.bfloat16).eval()
        latent = torch.randn(1, *latent_shape, dtype=torch.bfloat16)

    def run(module):
        return module.decode(latent, return_dict=False)

    return model, run


def make_text(args, _):
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(**read_config(args.model, "text_encoder"))
    with torch.device(args.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = UMT5EncoderModel(config).eval()
        finally:
            torch.set_default_dtype(default)
        ids = torch.randint(0, config.vocab_size, (1, 512))
        mask = torch.ones_like(ids)

    def run(module):
        return module(input_ids=ids, attention_mask=mask)

    return model, run


def compile_part(part, model):
    """The module that `run` takes, compiled where its work is."""
    if part == "decode":
        model.decoder = torch.compile(model.decoder)
        return model
    return torch.compile(model)


def time_peer(part, args, latent_shape):
    make = {"text": make_text, "forward": make_forward, "decode": make_decode}[part]
    results = {}
    try:
        model, run = make(args, latent_shape)
        results["eager"] = timed(lambda: run(model), args.repeats, args.device)
        if not args.no_compile:
            start = time.perf_counter()
            module = compile_part(part, model)
            results["compiled"] = timed(lambda: run(module), args.repeats, args.device)
            results["compiled"]["with_compilation_seconds"] = time.perf_counter() - start
    except Exception as error:  # one peer that fails must not take the others with it
        results["error"] = f"{type(error).__name__}: {error}"[:400]
    model = run = module = None
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    return results


def time_ours(args, size):
    command = [args.bench, "--model", args.model, "--device", args.device, "--dtype", "bf16"]
    command += ["--sizes", size, "--parts", ",".join(args.parts), "--attention", "dense"]
    command += ["--repeats", str(args.repeats)]
    done = subprocess.run(command + ["--json"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": done.stderr.strip()[-400:]}
    report = json.loads(done.stdout)
    return {"device": report["device"], **report["sizes"][0]}


def print_table(report):
    print(f"{'':10}{'ours':>12}{'eager':>12}{'compiled':>12}{'eager/ours':>12}{'compiled/ours':>15}")
    for part in report["parts"]:
        ours = report["ours"].get(part, {}).get("median_seconds")
        row = [ours] + [
            report["peers"][part].get(kind, {}).get("median_seconds")
            for kind in ("eager", "compiled")
        ]
        text = f"{part:10}" + "".join(f"{s * 1e3:9.1f} ms" if s else f"{'-':>12}" for s in row)
        for seconds, width in ((row[1], 12), (row[2], 15)):
            text += f"{seconds / ours:{width}.2f}" if seconds and ours else f"{'-':>{width}}"
        print(text)
        if "error" in report["peers"][part]:
            print(f"  {report['peers'][part]['error']}")
    if "error" in report["ours"]:
        print(report["ours"]["error"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder, for sizes and for --bench")
    parser.add_argument("--bench", help="our pipeline_bench")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="832x480x81", help="WxHxF")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}")
    width, height, frames = map(int, args.size.split("x"))
    latent_shape = (16, (frames - 1) // 4 + 1, height // 8, width // 8)

    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report = {"device": name, "torch": torch.__version__, "size": args.size, "parts": args.parts}
    # Ours first: it is a process of its own, and torch holds no memory yet.
    report["ours"] = time_ours(args, args.size) if args.bench else {}
    report["peers"] = {part: time_peer(part, args, latent_shape) for part in args.parts}
    print_table(report)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
