"""Gradients of SLA: autograd of the formula in sla.py, in f64, with the map held."""

from . import sla
from .common import must_agree, must_matter, normal

NAMES = ("q", "k", "v", "proj_weight", "proj_bias")


def gradients(forward, inputs, *settings):
    leaves = [inputs[n].detach().clone().requires_grad_() for n in NAMES]
    forward(*leaves, inputs["map"], *settings).backward(inputs["do"])
    return {f"d{n}": leaf.grad for n, leaf in zip(NAMES, leaves)}


def plain_bf16(*args):
    return sla.plain_bf16(*args).float()


def make_inputs(seed, shared, heads, length, width, blocks):
    inputs = sla.make_inputs(seed, heads, length, width)
    inputs["do"] = normal(seed, "do", 1, heads, length, width)
    inputs["map"] = sla.random_classes(seed + 1, heads, blocks, blocks, critical=1, negligible=1)
    return shared, inputs


def make(goldens):
    large = make_inputs(36, "sla_backward_d64", 1, 136, 64, 3)
    small = make_inputs(38, "sla_backward_small", 2, 53, 64, 4)
    for (shared, inputs), block, scope, feature_map in (
            (large, 64, "all", "softmax"), (large, 64, "noncritical", "elu"),
            (large, 64, "marginal", "softmax"), (small, 16, "marginal", "relu")):
        settings = (scope, feature_map, block, block)
        golden = gradients(sla.formula, inputs, *settings)
        outputs = dict(golden)
        if shared == "sla_backward_d64":
            for name, value in gradients(plain_bf16, inputs, *settings).items():
                must_agree(f"plain bf16 {name}", value, golden[name], 5e-2)
                outputs[name + "_bf16"] = value
        other = "noncritical" if scope != "noncritical" else "all"
        for name, value in gradients(sla.formula, inputs, other, *settings[1:]).items():
            if name != "dproj_bias":
                must_matter(f"scope {scope} (with {other}), {name}", value, golden[name])
        args = ["sla_backward", "--scope", scope, "--feature-map", feature_map, "--block-q",
                str(block), "--block-k", str(block)]
        goldens.write(f"sla_backward_{scope}_{feature_map}", args, inputs, outputs,
                      source="autograd of the formula in sla.py, f64", shared=shared)
