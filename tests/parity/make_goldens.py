#!/usr/bin/env python3
"""Makes (or checks) the golden tensors of the parity tests. See README.md in this folder.

    make_goldens.py --out goldens --sla-main DIR --sla-1 DIR            everything
    make_goldens.py --out goldens --only transformer,vae                some of it
    make_goldens.py --out goldens --only demo --demo model/demo         the shipped model
    make_goldens.py --check ...                                         compare, write nothing
"""

import argparse
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: SLA's kernels run on the CPU

import torch  # noqa: E402

from golden_makers import common, salad, sampler, sla, sla_backward, text_encoder, tokenizer, transformer, vae  # noqa: E402

PARTS = ("tokenizer", "text_encoder", "vae", "sampler", "sla", "sla_backward", "salad", "transformer", "demo")


def make(goldens, parts, demo):
    # The text encoder's embedding has a row for every id of the tokenizer.
    vocab_size = 0
    if "tokenizer" in parts or "text_encoder" in parts:
        print("tokenizer")
        vocab_size = tokenizer.make(goldens)
    for part, module in (("vae", vae), ("sampler", sampler), ("sla", sla), ("sla_backward", sla_backward), ("salad", salad),
                         ("transformer", transformer)):
        if part in parts:
            print(part)
            module.make(goldens)
    if "text_encoder" in parts:
        print("text_encoder")
        text_encoder.make(goldens, vocab_size)
    if "demo" in parts:
        print("demo")
        for module in (tokenizer, transformer, text_encoder, vae):
            module.make_demo(goldens, demo)


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=here / "goldens")
    parser.add_argument("--only", default=",".join(PARTS), help="a list of: " + ", ".join(PARTS))
    parser.add_argument("--sla-main", help="checkout of github.com/thu-ml/SLA, branch main")
    parser.add_argument("--sla-1", help="the same, branch SLA-1")
    parser.add_argument("--demo", type=pathlib.Path, default=here.parent.parent / "model" / "demo")
    parser.add_argument("--check", action="store_true",
                        help="make them elsewhere and compare with --out")
    args = parser.parse_args()
    parts = args.only.split(",")
    if "demo" in parts and not (args.demo / "transformer").is_dir():
        print(f"no model in {args.demo}: its goldens are left out")
        parts.remove("demo")
    if not set(parts) <= set(PARTS):
        parser.error("--only knows " + ", ".join(PARTS))
    if {"sla", "transformer"} & set(parts):
        if not (args.sla_main and args.sla_1):
            parser.error("sla and transformer need --sla-main and --sla-1")
        sla.load_released(args.sla_main, args.sla_1)

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    if not args.check:
        make(common.Goldens(args.out), parts, args.demo)
        return
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(args.out / "odd" / "tokenizer", f"{scratch}/odd/tokenizer")
        make(common.Goldens(scratch), parts, args.demo)
        complaints = common.compare_folders(scratch, args.out)
    print("\n".join(complaints) or "every golden is as committed")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
