"""What all makers share: weights that hide nothing, case files, model folders."""

import json
import math
import pathlib
import zlib

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def rng(seed, name):
    """A stream of its own for every (seed, name): the same numbers on every machine."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))


def normal(seed, name, *shape, std=1.0):
    return torch.from_numpy(rng(seed, name).standard_normal(shape) * std).float()


def fill(module, seed, gain=1.0):
    """Random weights with nothing trivial in them.

    Fresh modules have unit norm weights, zero biases and tiny modulation tables; with those, an
    implementation may forget a weight and still agree. Matrices get variance gain^2 / fan_in.
    """
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = normal(seed, name, *p.shape)
            if "scale_shift_table" in name:
                value = 0.4 * noise
            elif name.endswith("gamma") or (p.ndim == 1 and name.endswith("weight")):
                value = 1.0 + 0.3 * noise
            elif name.endswith("bias") and p.ndim == 1:
                value = 0.2 * noise
            elif "relative_attention_bias" in name or name.endswith("shared.weight"):
                value = noise
            else:
                value = noise * gain / math.sqrt(p[0].numel())
            p.copy_(value)
    return module.eval()


def round_to_bf16(module):
    """Makes every parameter a bf16 number, so that a BF16 file holds it exactly."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p.bfloat16().float())
    return module


def token_rows(seed, name, batch, rows, length, width):
    """[batch, length, width] embeddings: `rows` real ones each, then zeros, as the pipelines pad."""
    x = torch.zeros(batch, length, width)
    for b, n in enumerate(rows):
        x[b, :n] = normal(seed, f"{name}{b}", n, width)
    return x


class Goldens:
    """The output folder: model folders, and in cases/ `<case>.out.safetensors` with the golden.

    Its metadata says how to get there: `args` is run_network's command line (JSON), `in` the input
    file beside it (cases may share one), `model` the folder under goldens/ ("demo": model/demo).
    """

    def __init__(self, out):
        self.out = pathlib.Path(out)
        self.cases = self.out / "cases"
        self.cases.mkdir(parents=True, exist_ok=True)

    def model(self, name):
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write(self, case, args, inputs, outputs, model=None, source="", shared=None):
        metadata = {"args": json.dumps(args), "source": source}
        if inputs is not None:
            metadata["in"] = f"{shared or case}.in.safetensors"
            self._save(metadata["in"], inputs, {})
        if model:
            metadata["model"] = model
        self._save(f"{case}.out.safetensors", outputs, metadata)

    def _save(self, name, tensors, metadata):
        tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
        for key, value in tensors.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise SystemExit(f"{name}: {key} is not finite")
        save_file(tensors, str(self.cases / name), metadata)


def relative_error(a, b):
    """max |a - b| / max |b|: the parity tests' definition."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))


def must_matter(what, changed, golden, least=1e-2):
    """A mutation check: leaving `what` out must be seen far above the tests' tolerance."""
    error = relative_error(changed, golden)
    print(f"    without {what}: error {error:.2g}")
    if not error > least:
        raise SystemExit(f"the golden does not notice a missing {what} (error {error:.2g})")


def must_agree(what, a, b, most):
    error = relative_error(a, b)
    print(f"    {what}: error {error:.2g}")
    if not error < most:
        raise SystemExit(f"{what} disagree: {error:.2g} > {most:.2g}")


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def compare_folders(made, committed):
    """Every tensor of `made` against its committed twin; returns the complaints."""
    complaints = []
    for file in sorted(pathlib.Path(made).rglob("*.safetensors")):
        name = file.relative_to(made)
        twin = pathlib.Path(committed) / name
        if not twin.exists():
            complaints.append(f"{name}: not committed")
            continue
        a, b = load_file(str(file)), load_file(str(twin))
        if a.keys() != b.keys():
            complaints.append(f"{name}: other tensors")
            continue
        for key in a:
            if a[key].shape != b[key].shape or a[key].dtype != b[key].dtype:
                complaints.append(f"{name}: {key} has another shape or type")
            # bf16 runs may differ by their rounding from machine to machine.
            elif relative_error(a[key], b[key]) > (2e-2 if a[key].dtype == torch.bfloat16 else 1e-5):
                complaints.append(f"{name}: {key} differs by {relative_error(a[key], b[key]):.2g}")
    return complaints
