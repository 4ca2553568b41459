"""Times PyTorch's attention (FlashAttention-2 and cuDNN) and matrix products at the sizes of
kernels_bench, to be run beside it on the same GPU. Needs PyTorch with CUDA.

  peer_attention.py [--parts attention,backward,products,convolutions,sweep] [--json FILE]
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel


def milliseconds(run, samples=7):
    """The median of several samples of at least 20 ms each."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(repeats):
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeats

    sample(2)
    repeats = max(1, int(20 / max(sample(2), 1e-3)))
    return statistics.median(sample(repeats) for _ in range(samples))


rows = []


def report(name, flop, run):
    try:
        took = milliseconds(run)
        rows.append({"name": name, "ms": took, "flop": flop})
        print(f"{name:<44} {took:9.4f} ms {flop / took * 1e-9:9.1f} TFLOP/s", flush=True)
    except RuntimeError as error:
        print(f"{name:<44} {str(error).splitlines()[0]}", flush=True)


BACKENDS = (
    ("FlashAttention-2", SDPBackend.FLASH_ATTENTION),
    ("cuDNN", SDPBackend.CUDNN_ATTENTION),
)


def dense_attention(length, channels, name):
    q, k, v = (
        torch.randn(1, length, 12, channels, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    for backend_name, backend in BACKENDS:
        with sdpa_kernel(backend):
            report(
                name.format(backend_name),
                4 * length * length * 12 * channels,
                lambda: functional.scaled_dot_product_attention(q, k, v),
            )


def attention():
    for length, channels in ((32760, 128), (32768, 128), (32768, 64)):
        dense_attention(length, channels, f"torch {{}} {length} d{channels}")


def backward():
    """FLOP: five products of the size of forward's two."""
    length = 32760
    q, k, v = (
        torch.randn(
            1, 12, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for _ in range(3)
    )
    for name, backend in BACKENDS:
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(q, k, v)
            slopes = torch.randn_like(out)
            report(
                f"torch {name} {length} d128 backward",
                10 * length * length * 12 * 128,
                lambda: torch.autograd.grad(out, (q, k, v), slopes, retain_graph=True),
            )


def sweep():
    """At the lengths of kernels_bench's sweep, under its names."""
    for length in (8192, 16384, 32768, 65536, 131072):
        dense_attention(length, 128, f"sweep length {length}: {{}}")


def products():
    for n, depth in ((1536, 1536), (8960, 1536), (1536, 8960)):
        x = torch.randn(32760, depth, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(n, depth, device="cuda", dtype=torch.bfloat16) * 0.02
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        report(
            f"torch linear {n}x{depth}",
            2 * 32760 * n * depth,
            lambda: functional.linear(x, weight, bias),
        )


def convolutions():
    for channels, height, width, frames in ((384, 120, 208, 2), (192, 240, 416, 4), (96, 480, 832, 4)):
        x = torch.randn(1, channels, frames + 2, height, width, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last_3d)
        weight = torch.randn(channels, channels, 3, 3, 3, device="cuda", dtype=torch.bfloat16) * 0.02
        weight = weight.to(memory_format=torch.channels_last_3d)
        report(
            f"torch conv3d {channels} {height}x{width}x{frames}",
            2 * frames * height * width * channels * channels * 27,
            lambda: functional.conv3d(x, weight, padding=(0, 1, 1)),
        )


def main():
    parts = {f.__name__: f for f in (attention, backward, products, convolutions, sweep)}
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="attention,backward,products,convolutions")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for part in arguments.parts.split(","):
        parts[part]()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file)


if __name__ == "__main__":
    main()
