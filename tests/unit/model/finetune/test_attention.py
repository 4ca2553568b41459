"""The attention modules: against goldens of the released code, and their gradients against fp64 autograd."""

from __future__ import annotations

import json
from pathlib import Path

import formulas
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from slalom_finetune import AttentionOptions, SaladAttention, SparseLinearAttention, block_map
from slalom_finetune.rope import rope_table, rotate
from slalom_finetune.token_order import inverse, tile_order

CASES = Path(__file__).resolve().parents[3] / "parity" / "goldens" / "cases"


def golden(case: str) -> tuple[dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """run_network's options, inputs, outputs."""
    file = CASES / f"{case}.out.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    words = json.loads(metadata["args"])[1:]
    inputs = load_file(CASES / metadata.get("in", f"{case}.in.safetensors"))
    return dict(zip((w[2:] for w in words[::2]), words[1::2])), inputs, load_file(file)


def error(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape and ours.isfinite().all()
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).abs().max() / reference.abs().max())


def cases(network: str) -> list[str]:
    """The goldens of one of run_network's networks."""
    found = []
    for file in CASES.glob(f"{network}_*.out.safetensors"):
        with safe_open(file, "pt") as opened:
            if json.loads(opened.metadata()["args"])[0] == network:
                found.append(file.name.removesuffix(".out.safetensors"))
    return sorted(found)


def sla_module(options: dict[str, str], inputs: dict[str, Tensor]) -> SparseLinearAttention:
    module = SparseLinearAttention(inputs["q"].shape[-1], float(options.get("topk", 0.5)), options["feature-map"],
                                   int(options["block-q"]), int(options["block-k"]), scope=options["scope"],
                                   negligible=float(options.get("negligible", 0.0)))
    module.load_state_dict({"proj_l.weight": inputs["proj_weight"], "proj_l.bias": inputs["proj_bias"]})
    module.dtype = torch.float32
    return module


@pytest.mark.parametrize("case", cases("sla"))
def test_sla_is_the_released_code(case: str) -> None:
    options, inputs, outputs = golden(case)
    module = sla_module(options, inputs)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    if "map" not in inputs:
        assert torch.equal(block_map.topk_map(q, k, module.options), outputs["map"])
    assert error(module(q, k, v, classes=inputs.get("map")), outputs["o"]) < 1e-5


@pytest.mark.parametrize("case", [case for case in cases("sla") if "o_bf16" in golden(case)[2]])
def test_sla_in_bf16_keeps_the_error_rule(case: str) -> None:
    options, inputs, outputs = golden(case)
    module = sla_module(options, inputs)
    module.dtype = torch.bfloat16  # the released default
    out = module(inputs["q"], inputs["k"], inputs["v"], classes=inputs["map"])
    assert out.dtype == torch.float32
    assert error(out, outputs["o"]) <= 2 * error(outputs["o_bf16"], outputs["o"])


@pytest.mark.parametrize("case", cases("sla_backward"))
def test_sla_has_the_gradients_of_autograd(case: str) -> None:
    options, inputs, outputs = golden(case)
    module = sla_module(options, inputs)
    tensors = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    out = module(*tensors, classes=inputs["map"])
    got = gradients((out * inputs["do"]).sum(), [*tensors, *module.parameters()])
    for name, mine in zip(("dq", "dk", "dv", "dproj_weight", "dproj_bias"), got):
        assert error(mine, outputs[name]) < 1e-4, name


@pytest.mark.parametrize("case", cases("salad"))
def test_salad_is_the_formula(case: str) -> None:
    options, inputs, outputs = golden(case)
    b, heads, length, width = inputs["q"].shape
    grid = tuple(int(n) for n in options["grid"].split(","))
    module = SaladAttention(heads, width, float(options["topk"]), int(options["block-q"]), int(options["block-k"]),
                            options["map"], options["gate"])
    module.load_state_dict({name.replace("_", "."): inputs[name]
                            for name in ("proj_weight", "proj_bias", "gate_weight", "gate_bias")})
    heads_last = [inputs[name].transpose(1, 2) for name in ("q", "k", "v")]
    out = module(inputs["x"], *heads_last, rope_table(grid, width), grid, inputs.get("map"))
    assert error(out, outputs["o"]) < 1e-5


def draw(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("scope", ["marginal", "noncritical", "all"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("length,block_q,block_k", [(53, 16, 16), (64, 32, 16), (40, 16, 32), (1, 16, 16)])
def test_gradients_of_sla(scope: str, feature_map: str, length: int, block_q: int, block_k: int) -> None:
    generator = torch.Generator().manual_seed(7)
    module = SparseLinearAttention(16, 0.3, feature_map, block_q, block_k, scope=scope, negligible=0.25).double()
    module.dtype = None
    weight, bias = draw(generator, 16, 16, scale=0.3), draw(generator, 16)
    module.load_state_dict({"proj_l.weight": weight, "proj_l.bias": bias})
    q, k, v, d_out = (draw(generator, 2, 2, length, 16) for _ in range(4))
    rows, columns = block_map.blocks(length, block_q), block_map.blocks(length, block_k)
    classes = formulas.random_classes(generator, (2, 2, rows, columns), 1, columns // 4)
    expected = formulas.sla(q, k, v, classes, weight, bias, scope, feature_map, block_q, block_k)
    got = module(q, k, v, classes=classes)
    assert error(got, expected) < 1e-12
    parameters = [module.proj_l.weight, module.proj_l.bias]
    ours = gradients((got * d_out.detach()).sum(), [q, k, v, *parameters])
    theirs = gradients((expected * d_out.detach()).sum(), [q, k, v, weight, bias])
    for mine, reference in zip(ours, theirs):
        assert float((mine - reference).abs().max()) < 1e-11 * max(1.0, float(reference.abs().max()))


def test_rows_with_unlike_and_no_critical_blocks() -> None:
    generator = torch.Generator().manual_seed(3)
    module = SparseLinearAttention(8, 0.5, "elu", 16, 16, scope="noncritical").double()
    module.dtype = None
    q, k, v = (draw(generator, 1, 1, 45, 8) for _ in range(3))
    classes = torch.tensor([[[[1, 1, 2], [2, 2, 1], [2, 2, 2]]]], dtype=torch.uint8)
    out = module(q, k, v, classes=classes)
    pairs = formulas.spread(classes, 16, 16, 45)
    assert error(out[..., :32, :], formulas.sparse(q, k, v, pairs)[..., :32, :]) < 1e-12
    assert out[..., 32:, :].abs().max() == 0
    for grad in gradients(out.square().sum(), [q, k, v]):
        assert grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("length", [24, 30])
def test_gradients_of_salad(length: int) -> None:
    generator = torch.Generator().manual_seed(9)
    grid, heads, width, block = (length // 6, 2, 3), 2, 16, 8
    module = SaladAttention(heads, width, 0.4, block, block).double()
    d = heads * width
    proj = draw(generator, d, d, scale=0.2), draw(generator, d)
    gate = draw(generator, 1, d, scale=0.3), draw(generator, 1)
    module.load_state_dict({"proj.weight": proj[0], "proj.bias": proj[1], "gate.weight": gate[0], "gate.bias": gate[1]})
    q, k, v = (draw(generator, 2, length, heads, width) for _ in range(3))
    x, d_out = draw(generator, 2, length, d), draw(generator, 2, length, d).detach()
    count = block_map.blocks(length, block)
    classes = formulas.random_classes(generator, (2, heads, count, count), 1, 0)
    rope = tuple(table.double() for table in rope_table(grid, width))
    expected = formulas.salad(x, q, k, v, rope, classes, proj, gate, block)
    got = module(x, q, k, v, rope, grid, classes)
    assert error(got, expected) < 1e-12
    ours = gradients((got * d_out).sum(), [x, q, k, v, *module.parameters()])
    theirs = gradients((expected * d_out).sum(), [x, q, k, v, *proj, *gate])
    for mine, reference in zip(ours, theirs):
        assert float((mine - reference).abs().max()) < 1e-10 * max(1.0, float(reference.abs().max()))


def test_every_key_critical_is_dense_attention() -> None:
    q, k, v = (torch.randn(1, 2, 70, 32) for _ in range(3))
    module = SparseLinearAttention(32, 1.0)
    module.dtype = torch.float32
    out, kept = module(q, k, v, return_sparsity=True)
    assert kept == 1.0
    assert error(out, torch.nn.functional.scaled_dot_product_attention(q, k, v)) < 1e-5


def test_untrained_salad_is_sparse_and_a_dropped_branch_has_no_weights() -> None:
    options = AttentionOptions.for_kind("salad", topk=0.4, dropped_layers=(1,))
    full, dropped = (SaladAttention.of(2, 16, options, layer) for layer in (0, 1))
    assert list(full.state_dict()) == ["proj.weight", "proj.bias", "gate.weight", "gate.bias"]
    assert not list(dropped.parameters())
    x, grid = torch.randn(1, 130, 32), (1, 10, 13)
    q, k, v = (torch.randn(1, 130, 2, 16) for _ in range(3))
    rope = rope_table(grid, 16)
    assert torch.equal(full(x, q, k, v, rope, grid), dropped(x, q, k, v, rope, grid))


def test_a_tile_order_is_a_permutation_of_near_tokens() -> None:
    order = tile_order((5, 6, 9), (4, 4, 4))
    assert torch.equal(order.sort().values, torch.arange(5 * 6 * 9))
    assert torch.equal(order[inverse(order)], torch.arange(5 * 6 * 9))
    first = torch.stack([order[:64] // 54, order[:64] // 9 % 6, order[:64] % 9])
    assert first.max() == 3  # the first box is 4 x 4 x 4
    assert torch.equal(tile_order((3, 4, 5), (1, 1, 1)), torch.arange(60))


def test_tiles_in_the_modules_are_a_permutation_around_them() -> None:
    grid, tile = (5, 4, 6), (2, 4, 2)
    order = tile_order(grid, tile)
    q, k, v = (torch.randn(1, 2, 120, 16) for _ in range(3))
    plain, tiled = (SparseLinearAttention(16, 0.3, BLKQ=16, BLKK=16, tile=t) for t in ((1, 1, 1), tile))
    for module in (plain, tiled):
        module.dtype = torch.float32
        module.proj_l.weight.data.copy_(torch.eye(16))
    expected = plain(*(x[:, :, order] for x in (q, k, v)))
    assert torch.equal(tiled(q, k, v, grid=grid)[:, :, order], expected)
    with pytest.raises(ValueError, match="grid"):
        tiled(q, k, v)

    x, heads_last = torch.randn(1, 120, 32), [t.transpose(1, 2) for t in (q, k, v)]
    rope = rope_table(grid, 16)
    plain, tiled = (SaladAttention(2, 16, 0.3, 16, 16, tile=t) for t in ((1, 1, 1), tile))
    for module in (plain, tiled):
        module.proj.weight.data.copy_(torch.eye(32))
    turned = tuple(table[order] for table in rope)
    expected = plain(x[:, order], *(t[:, order] for t in heads_last), turned, grid)
    assert torch.equal(tiled(x, *heads_last, rope, grid)[:, order], expected)


@pytest.mark.parametrize("kind", ["sla", "salad"])
def test_torch_compile_gives_one_graph_with_the_same_gradients(kind: str) -> None:
    torch.manual_seed(1)
    if kind == "sla":
        module = SparseLinearAttention.of(16, AttentionOptions(topk=0.3, block_q=16, block_k=16))
        def run(x, q, k, v, rope, grid):  # noqa: ANN001, ANN202, E306
            return module(*(rotate(t, rope).transpose(1, 2) for t in (q, k)), v.transpose(1, 2)).transpose(1, 2)
    else:
        module = SaladAttention(2, 16, 0.3, 16, 16)
        def run(x, q, k, v, rope, grid):  # noqa: ANN001, ANN202, E306
            return module(x, q, k, v, rope, grid)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for grid in ((2, 5, 8), (3, 5, 8), (4, 5, 9)):  # from the second on, the length is a symbol
        length = grid[0] * grid[1] * grid[2]
        tensors = [torch.randn(1, length, 32).requires_grad_(),
                   *(torch.randn(1, length, 2, 16).requires_grad_() for _ in range(3))]
        more = rope_table(grid, 16), grid
        plain, mine = run(*tensors, *more), compiled(*tensors, *more)
        assert error(mine, plain) < 1e-5
        used = (tensors[1:] if kind == "sla" else tensors) + list(module.parameters())
        for one, reference in zip(gradients(mine.square().sum(), used), gradients(plain.square().sum(), used)):
            assert error(one, reference) < 1e-4


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(1, 40, 2, 8, generator=generator).requires_grad_() for _ in range(3)]
    classes = formulas.random_classes(generator, (1, 2, 3, 3), 1, 1)
    weight, bias = torch.randn(8, 8).requires_grad_(), torch.randn(8).requires_grad_()
    for parameters in ((weight, bias), (None, None)):
        torch.library.opcheck(torch.ops.slalom.sla.default, (*tensors, classes, *parameters, "marginal", "softmax", 16, 16),
                              test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_autocast_computes_in_its_type_and_gives_back_the_given_one() -> None:
    torch.manual_seed(2)
    module = SparseLinearAttention.of(16, AttentionOptions(topk=0.3, block_q=16, block_k=16))
    torch.nn.init.normal_(module.proj_l.weight, std=0.2)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    plain = module(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(q, k, v)
    assert low.dtype == torch.float32 and 0 < error(low, plain) < 0.03
    low.sum().backward()
    assert module.proj_l.weight.grad.dtype == torch.float32


def test_adapters_describe_themselves() -> None:
    options = AttentionOptions.for_kind("salad", topk=0.2, tile=(4, 4, 4), dropped_layers=(0, 3))
    assert AttentionOptions.from_metadata(options.to_metadata()) == options
    assert "tile" not in AttentionOptions().to_metadata()["slalom.attention"]
    with pytest.raises(ValueError, match="unknown"):
        AttentionOptions.from_metadata({"slalom.attention": '{"kind": "sla", "colour": 1}'})
    with pytest.raises(ValueError, match="windows"):
        AttentionOptions.for_kind("salad", map="window", tile=(4, 4, 4))


def test_autocast_does_not_reach_into_the_operator() -> None:
    generator = torch.Generator().manual_seed(9)
    module = SparseLinearAttention.of(16, AttentionOptions(topk=0.3, block_q=16, block_k=16))
    torch.nn.init.normal_(module.proj_l.weight, std=0.2, generator=generator)
    tensors = [torch.randn(1, 2, 80, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    used = [*tensors, *module.parameters()]
    expected = module(*tensors)
    wanted = gradients(expected.float().square().sum(), used)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(*tensors)
        grads = gradients(got.float().square().sum(), used)
    assert torch.equal(got, expected) and all(torch.equal(a, b) for a, b in zip(grads, wanted))
