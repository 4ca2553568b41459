"""The operators on libslalom_attention: beside plain PyTorch, forward and backward, on every device that is here."""

from __future__ import annotations

import re
from ctypes import c_double, c_int32, c_int64, c_size_t, c_void_p

import formulas
import pytest
import torch
from conftest import ROOT
from test_attention import error
from torch import Tensor

from slalom_finetune import SaladAttention, SparseLinearAttention, block_map, fallback, library
from slalom_finetune.ops import sla_op
from slalom_finetune.rope import rope_table

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def here(device: str) -> torch.device:
    found = torch.device(device)
    if library.library() is None:
        pytest.skip("libslalom_attention is not there (SLALOM_ATTENTION_LIBRARY)")
    if not library.has_library(torch.float32, found):
        pytest.skip(f"this library was built without {device}")
    return found


@pytest.mark.parametrize("name,ours", [("slalom_sla_args", library.SlaArgs), ("slalom_salad_args", library.SaladArgs),
                                       ("slalom_map_args", library.MapArgs)])
def test_argument_structs_are_those_of_the_header(name: str, ours: type) -> None:
    header = (ROOT / "kernels" / "c_api" / "slalom_attention.h").read_text()
    body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", header, re.S).group(1)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    types = {"size_t": c_size_t, "int64_t": c_int64, "int32_t": c_int32, "double": c_double}
    members = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        kind, *names = re.split(r"[\s,]+", declaration.replace("const ", ""))
        members += [(one.lstrip("*"), c_void_p if "*" in declaration else types[kind]) for one in names]
    assert members == ours._fields_


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scope", ["marginal", "noncritical", "all"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("linear", [True, False])
def test_sla(device: str, scope: str, feature_map: str, linear: bool) -> None:
    where, generator = here(device), torch.Generator().manual_seed(11)
    length, width, block = 200, 64, 64
    q, k, v, d_out = (torch.randn(2, length, 2, width, generator=generator).to(where).requires_grad_() for _ in range(4))
    weight, bias = ((torch.randn(shape, generator=generator) * 0.2).to(where).requires_grad_()
                    for shape in ((width, width), (width,))) if linear else (None, None)
    count = block_map.blocks(length, block)
    classes = formulas.random_classes(generator, (2, 2, count, count), 1, 1).to(where)
    out, lse = sla_op(q, k, v, classes, weight, bias, scope, feature_map, block, block)
    inputs = [t for t in (q, k, v, weight, bias) if t is not None]
    grads = torch.autograd.grad((out * d_out.detach()).sum(), inputs)

    swapped = [t.detach().double().transpose(1, 2) for t in (q, k, v, d_out)]
    parameters = [None if p is None else p.detach().double() for p in (weight, bias)]
    expected, expected_lse = fallback.sla_forward(*swapped[:3], classes, *parameters, scope, feature_map, block, block)
    tolerance = 1e-4 if device == "cpu" else 3e-3  # a GPU may multiply in TF32
    assert error(out, expected.transpose(1, 2)) < tolerance and error(lse, expected_lse) < tolerance
    wanted = fallback.sla_backward(swapped[3], *swapped[:3], classes, parameters[0], expected_lse, scope, feature_map,
                                   block, block)
    wanted = [*(g.transpose(1, 2) for g in wanted[:3]), *wanted[3:]]
    for mine, reference in zip(grads, wanted):
        assert error(mine, reference) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["topk", "window"])
@pytest.mark.parametrize("gate", ["token", "sample"])
def test_salad(device: str, kind: str, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, generator = here(device), torch.Generator().manual_seed(12)
    grid, heads, width = (5, 6, 7), 2, 64
    length = 5 * 6 * 7
    module = SaladAttention(heads, width, 0.3, 64, 64, kind, gate).to(where)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tensors = [torch.randn(2, length, heads * width, generator=generator).to(where).requires_grad_(),
               *(torch.randn(2, length, heads, width, generator=generator).to(where).requires_grad_() for _ in range(3))]
    d_out, rope = torch.randn(2, length, heads * width, generator=generator).to(where), rope_table(grid, width, where)

    def run(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out = module(x, q, k, v, rope, grid)
        return [out, *torch.autograd.grad((out * d_out).sum(), [x, q, k, v, *module.parameters()])]

    got = run(*tensors)
    module, rope = module.double(), tuple(table.double() for table in rope)  # the library does not know this type
    d_out = d_out.double()
    expected = run(*(t.detach().double().requires_grad_() for t in tensors))
    for mine, reference in zip(got, expected):
        assert error(mine, reference) < (1e-4 if device == "cpu" else 3e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_keeps_the_error_rule(device: str) -> None:
    """At most twice as far from float64 as plain PyTorch, whose sums are float32, on the same bf16 inputs."""
    where, generator = here(device), torch.Generator().manual_seed(13)
    module = SparseLinearAttention(128, 0.3, scope="marginal", negligible=0.2).to(where)
    module.proj_l.weight.data.copy_(torch.randn(128, 128, generator=generator) * 0.1)
    q, k, v = (torch.randn(1, 2, 500, 128, generator=generator).to(where) for _ in range(3))
    classes = formulas.random_classes(generator, (1, 2, 8, 8), 2, 2).to(where)
    out = module(q, k, v, classes=classes)
    low = [t.bfloat16() for t in (q, k, v)]
    plain, _ = fallback.sla_forward(*low, classes, module.proj_l.weight, module.proj_l.bias, "marginal", "softmax", 64, 64)
    exact, _ = fallback.sla_forward(*(t.double() for t in low), classes, module.proj_l.weight, module.proj_l.bias,
                                    "marginal", "softmax", 64, 64)
    assert error(out, exact) <= 2 * error(plain, exact) + 2**-8


def test_what_does_not_fit_is_an_error_with_a_reason() -> None:
    q = torch.randn(1, 8, 1, 7, device=here("cpu"))  # 7 is no head size
    with pytest.raises(RuntimeError, match="slalom_sla_forward: ."):
        sla_op(q, q, q, torch.ones(1, 1, 1, 1, dtype=torch.uint8), None, None, "all", "softmax", 16, 16)
