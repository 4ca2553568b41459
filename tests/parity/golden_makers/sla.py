"""SLA: the released code (github.com/thu-ml/SLA), its Triton kernels run by Triton's interpreter.

Branch `main` has the linear branch over every key (scope `all`), branch `SLA-1` over the keys of the
blocks that are not critical (`noncritical`). Neither has negligible blocks, so the paper's scope
`marginal` comes from the formula below, in f64, which is held against both branches first.
The released modules work in bf16 by default; setting their dtype runs them in f32.
SLA-1 divides without the 1e-5 of `main`; the difference is below 1e-6 here.
"""

import importlib.util
import os
import sys

import numpy as np
import torch

from .common import must_agree, must_matter, normal, rng

NEGLIGIBLE, CRITICAL, MARGINAL = 0, 1, 2
SOURCE = "thu-ml/SLA, branch "
_released = {}


def load_released(main, sla1):
    """Imports both checkouts, which share a package name, under names of their own."""
    for scope, branch, folder in (("all", "main", main), ("noncritical", "SLA-1", sla1)):
        package = os.path.join(folder, "sparse_linear_attention")
        name = "released_sla_" + scope
        spec = importlib.util.spec_from_file_location(
            name, os.path.join(package, "__init__.py"), submodule_search_locations=[package])
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        _released[scope] = (branch, sys.modules[name + ".core"])


def released(scope, q, k, v, weight, bias, feature_map, block_q, block_k, topk=None, classes=None):
    """Their forward; with `classes` their block map is replaced by the critical blocks in it."""
    core = _released[scope][1]
    module = core.SparseLinearAttention(q.shape[-1], topk, feature_map, block_q, block_k)
    module.dtype = torch.float32
    with torch.no_grad():
        module.proj_l.weight.copy_(weight)
        module.proj_l.bias.copy_(bias)
    own_map = core.get_block_map

    def forced(q, k, topk_ratio, BLKQ, BLKK):
        chosen = (classes == CRITICAL).to(torch.int8)
        count = int(chosen[0, 0, 0].sum())
        return chosen, torch.topk(chosen, count, dim=-1).indices, count

    core.get_block_map = own_map if classes is None else forced
    try:
        with torch.no_grad():
            return module(q, k, v)
    finally:
        core.get_block_map = own_map


def released_map(q, k, topk, block_q, block_k):
    """Classes of their map: what is not critical is marginal."""
    chosen, _, _ = _released["all"][1].get_block_map(q, k, topk, block_q, block_k)
    return torch.where(chosen > 0, CRITICAL, MARGINAL).to(torch.uint8)


def spread(classes, block_q, block_k, length):
    """Block classes [.., Nq, Nk] -> one per pair of tokens [.., L, L]."""
    rows = classes.repeat_interleave(block_q, -2)[..., :length, :]
    return rows.repeat_interleave(block_k, -1)[..., :length]


def features(x, feature_map):
    if feature_map == "softmax":
        return torch.softmax(x, -1)
    return torch.nn.functional.elu(x) + 1 if feature_map == "elu" else torch.relu(x)


def sparse_branch(q, k, v, pairs):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(pairs != CRITICAL, -torch.inf), -1) @ v


def formula(q, k, v, weight, bias, classes, scope, feature_map, block_q, block_k):
    """SLA (arXiv 2509.24006) written as masks over all pairs of tokens, f64."""
    q, k, v, weight, bias = (x.double() for x in (q, k, v, weight, bias))
    pairs = spread(classes, block_q, block_k, q.shape[-2])
    scope_mask = {"all": pairs >= 0, "noncritical": pairs != CRITICAL,
                  "marginal": pairs == MARGINAL}[scope]
    products = (features(q, feature_map) @ features(k, feature_map).transpose(-1, -2)) * scope_mask
    linear = products @ v / (products.sum(-1, keepdim=True) + 1e-5)
    return (sparse_branch(q, k, v, pairs) + linear @ weight.T + bias).float()


def plain_bf16(q, k, v, weight, bias, classes, scope, feature_map, block_q, block_k):
    """The same with bf16 where the released code rounds: inputs, P, features, sums and outputs.

    For the error rule of bf16 runs. (Triton's interpreter does not compute bf16 products rightly.)
    """
    q, k, v, weight, bias = (x.bfloat16() for x in (q, k, v, weight, bias))
    pairs = spread(classes, block_q, block_k, q.shape[-2])
    scores = (q.float() @ k.float().mT / q.shape[-1] ** 0.5).masked_fill(pairs != CRITICAL, -torch.inf)
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    sparse = ((p.bfloat16().float() @ v.float()) / p.sum(-1, keepdim=True)).bfloat16()
    phi_q, phi_k = (features(x, feature_map).bfloat16() for x in (q, k))
    linear = torch.zeros_like(sparse)
    for row in range(classes.shape[-2]):
        rows = slice(row * block_q, min((row + 1) * block_q, q.shape[-2]))
        one = pairs[..., rows.start, :, None]
        inside = {"all": one >= 0, "noncritical": one != CRITICAL, "marginal": one == MARGINAL}[scope]
        keys = phi_k * inside
        sums = (phi_q[..., rows, :] * keys.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        linear[..., rows, :] = phi_q[..., rows, :] @ (keys.mT @ v) / (sums + 1e-5)
    return sparse + linear @ weight.T + bias


def random_classes(seed, heads, blocks_q, blocks_k, critical, negligible):
    """The same count of each class in every row, in random places."""
    row = [CRITICAL] * critical + [NEGLIGIBLE] * negligible
    row += [MARGINAL] * (blocks_k - len(row))
    generator = rng(seed, "classes")
    rows = [generator.permutation(row) for _ in range(heads * blocks_q)]
    return torch.from_numpy(np.array(rows, dtype=np.uint8)).reshape(1, heads, blocks_q, blocks_k)


def make_inputs(seed, heads, length, width):
    shape = (1, heads, length, width)
    return {
        "q": normal(seed, "q", *shape), "k": normal(seed, "k", *shape) + normal(seed, "shift", width),
        "v": normal(seed, "v", *shape),
        "proj_weight": normal(seed, "weight", width, width, std=0.2),
        "proj_bias": normal(seed, "bias", width, std=0.2),
    }


def sparsity(classes):
    return torch.tensor([1.0 - float((classes == CRITICAL).double().mean())])


def write(goldens, case, shared, inputs, outputs, scope, feature_map, blocks, topk, negligible,
          source):
    args = ["sla", "--scope", scope, "--feature-map", feature_map, "--topk", str(topk),
            "--negligible", str(negligible), "--block-q", str(blocks[0]), "--block-k",
            str(blocks[1])]
    goldens.write(case, args, inputs, outputs, source=source, shared=shared)


def make_released(goldens):
    """Forced maps, D 64, blocks 64 x 64."""
    inputs = make_inputs(31, 1, 136, 64)
    inputs["map"] = random_classes(32, 1, 3, 3, critical=1, negligible=1)
    tensors = [inputs[n] for n in ("q", "k", "v", "proj_weight", "proj_bias")]
    for scope, feature_map in (("all", "softmax"), ("noncritical", "elu")):
        golden = released(scope, *tensors, feature_map, 64, 64, classes=inputs["map"])
        must_agree(f"formula and released code, {scope} {feature_map}",
                   formula(*tensors, inputs["map"], scope, feature_map, 64, 64), golden, 3e-6)
        outputs = {"o": golden, "map": inputs["map"], "sparsity": sparsity(inputs["map"])}
        outputs["o_bf16"] = plain_bf16(*tensors, inputs["map"], scope, feature_map, 64, 64)
        must_agree("plain bf16", outputs["o_bf16"], golden, 3e-2)
        write(goldens, f"sla_{scope}_{feature_map}", "sla_d64", inputs, outputs,
              scope, feature_map, (64, 64), 0.34, 0.34, SOURCE + _released[scope][0])
        for other in ("all", "noncritical", "marginal"):
            if other != scope:
                must_matter(f"scope {scope} (with {other})",
                            formula(*tensors, inputs["map"], other, feature_map, 64, 64), golden)


def make_own_map(goldens):
    """Their map and their blocks of 128 x 64, D 128, a ragged tail."""
    inputs = make_inputs(33, 1, 136, 128)
    tensors = [inputs[n] for n in ("q", "k", "v", "proj_weight", "proj_bias")]
    classes = released_map(inputs["q"], inputs["k"], 0.4, 128, 64)
    golden = released("all", *tensors, "softmax", 128, 64, topk=0.4)
    must_agree("formula and released code, their map",
               formula(*tensors, classes, "all", "softmax", 128, 64), golden, 3e-6)
    write(goldens, "sla_own_map", None, inputs,
          {"o": golden, "map": classes, "sparsity": sparsity(classes)},
          "all", "softmax", (128, 64), 0.4, 0.0, SOURCE + "main")


def make_formula(goldens):
    """Small blocks and the paper's scope, where no released code exists."""
    inputs = make_inputs(34, 2, 53, 64)
    inputs["map"] = random_classes(35, 2, 4, 4, critical=1, negligible=1)
    tensors = [inputs[n] for n in ("q", "k", "v", "proj_weight", "proj_bias")]
    for feature_map in ("softmax", "elu", "relu"):
        golden = formula(*tensors, inputs["map"], "marginal", feature_map, 16, 16)
        write(goldens, f"sla_marginal_{feature_map}", "sla_small", inputs,
              {"o": golden, "map": inputs["map"], "sparsity": sparsity(inputs["map"])},
              "marginal", feature_map, (16, 16), 0.25, 0.25, "formula in sla.py, f64")


def make(goldens):
    make_released(goldens)
    make_own_map(goldens)
    make_formula(goldens)


def rotate(x, rotary):
    """Interleaved pairs; x [B, L, H, D], diffusers' (cos, sin) [1, L, 1, D]."""
    cos, sin = rotary[0][..., 0::2].to(x.dtype), rotary[1][..., 1::2].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Processor:
    """A diffusers attention processor that leaves everything but the attention itself as it is."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, attention):
        self.attention = attention

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                 rotary_emb=None):
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        return attn.to_out[0](self.attention(hidden_states, q, k, v, rotary_emb))


def install(model, tensors, settings):
    """Replaces the self attention of every block by the released module."""
    for n, block in enumerate(model.blocks):
        weight = tensors[f"blocks.{n}.attn1.sla.proj_l.weight"].bfloat16().float()
        bias = tensors[f"blocks.{n}.attn1.sla.proj_l.bias"].bfloat16().float()

        def attention(x, q, k, v, rotary, weight=weight, bias=bias):
            heads = [t.transpose(1, 2).contiguous() for t in (rotate(q, rotary), rotate(k, rotary), v)]
            out = released(settings["scope"], *heads, weight, bias, settings["feature_map"],
                           settings["block_q"], settings["block_k"], topk=settings["topk"])
            return out.transpose(1, 2).flatten(2)

        block.attn1.set_processor(Processor(attention))
