"""The transformer: against the goldens of diffusers, and its adapters against slalomd's own networks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_attention import error, golden
from torch import Tensor

from slalom_finetune import AttentionOptions
from slalom_finetune.adapter import add_lora, load_adapter, save_adapter
from slalom_finetune.wan import WanTransformer

GOLDENS = ROOT / "tests" / "parity" / "goldens"
DEMO = ROOT / "model" / "demo"


def run(model: WanTransformer, inputs: dict[str, Tensor], adapted: bool = True) -> Tensor:
    """All 512 rows of text are given: those that are zero count as padding."""
    text = inputs["encoder_hidden_states"]
    mask = (text.abs().sum(-1) > 0).float()
    longest = int(mask.sum(1).max())
    latents = inputs["hidden_states"]
    with torch.no_grad():
        return model(latents, inputs["timestep"], text[:, :longest], mask[:, :longest], model.tokens(latents), adapted)


@pytest.mark.parametrize("case,folder", [
    ("transformer_odd", GOLDENS / "odd"), ("transformer_one_frame", GOLDENS / "odd"),
    ("transformer_head128", GOLDENS / "head128"), ("demo_transformer", DEMO)])
def test_dense_is_diffusers(case: str, folder: Path) -> None:
    _, inputs, outputs = golden(case)
    model = WanTransformer.load(folder / "transformer")
    assert error(run(model, inputs), outputs["sample"]) < 2e-5


@pytest.mark.parametrize("kind", ["sla", "salad"])
def test_adapters_are_the_released_code_in_diffusers(kind: str) -> None:
    _, inputs, outputs = golden(f"transformer_{kind}")
    model = WanTransformer.load(GOLDENS / "head128" / "transformer")
    dense = run(model, inputs)
    load_adapter(model, GOLDENS / "head128" / "attention" / f"{kind}.safetensors")
    assert error(run(model, inputs), outputs["sample"]) < 2e-5
    assert torch.equal(run(model, inputs, adapted=False), dense)


def trained(model: WanTransformer, options: AttentionOptions, rank: int, where: str = "self") -> None:
    """As if it had been trained: nothing in the adapter is zero."""
    model.adapt(options)
    if rank:
        add_lora(model, rank, seed=3, where=where)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in (".sla.", ".salad.", ".lora_")):
                drawn = torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(drawn.bfloat16())


def run_network() -> Path:
    named = os.environ.get("SLALOM_RUN_NETWORK", str(ROOT / "build" / "cpu" / "tests" / "parity" / "run_network"))
    if not Path(named).exists():
        pytest.skip("run_network is not built (SLALOM_RUN_NETWORK)")
    return Path(named)


@pytest.mark.parametrize("options,rank", [  # a negative rank: LoRA on every layer that may have one
    (AttentionOptions(topk=0.3, block_q=16, block_k=16), 4),
    (AttentionOptions(topk=0.3, scope="all", feature_map="elu", block_q=16, block_k=32), 0),
    (AttentionOptions(topk=1.0, negligible=0.0), 2),
    (AttentionOptions(topk=0.3, block_q=16, block_k=16, tile=(2, 4, 4)), 0),
    (AttentionOptions(block_q=16, block_k=16, tile=(2, 1, 8)), 4),
    (AttentionOptions.for_kind("sla", layer_topk=(0.1, 0.5, 0.2, 0.6, 0.1), block_q=16, block_k=16), -4),
    (AttentionOptions.for_kind("salad", topk=0.3, block_q=16, block_k=16, tile=(2, 3, 4)), 0),
    (AttentionOptions.for_kind("salad", topk=0.1, block_q=16, block_k=16, tile=(2, 1, 8)), 4),
    (AttentionOptions.for_kind("salad", topk=0.3, block_q=16, block_k=16, dropped_layers=(1,)), 4),
    (AttentionOptions.for_kind("salad", topk=0.3, block_q=16, block_k=16, map="window", gate="sample"), 0),
], ids=lambda value: f"{value.kind}-{value.topk}-{value.map}-{value.tile[0]}" if isinstance(value, AttentionOptions) else str(value))
def test_slalomd_gives_what_was_trained(options: AttentionOptions, rank: int, tmp_path: Path) -> None:
    program = run_network()
    model = WanTransformer.load(DEMO / "transformer")
    trained(model, options, abs(rank), "all" if rank < 0 else "self")
    for part in DEMO.iterdir():
        if part.is_dir() and part.name not in ("recipe", "attention"):
            shutil.copytree(part, tmp_path / part.name)
        elif part.suffix == ".json":
            shutil.copy(part, tmp_path)
    written = save_adapter(model.state_dict(), options, tmp_path, {})
    assert AttentionOptions.from_metadata(__import__("safetensors").safe_open(written, "pt").metadata()) == options
    generator = torch.Generator().manual_seed(5)
    text = torch.zeros(1, 512, model.config.text_dim)
    text[:, :9] = torch.randn(1, 9, model.config.text_dim, generator=generator)
    inputs = {"hidden_states": torch.randn(1, 16, 3, 12, 16, generator=generator), "timestep": torch.tensor([640.0]),
              "encoder_hidden_states": text}
    save_file(inputs, tmp_path / "in.safetensors")
    subprocess.run([program, "transformer", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--model", tmp_path,
                    "--attention", options.kind], check=True)
    ours = run(model, inputs)
    assert error(load_file(tmp_path / "out.safetensors")["sample"], ours) < 1e-4
    assert error(run(model, inputs, adapted=False), ours) > 1e-2
    again = WanTransformer.load(DEMO / "transformer")
    assert load_adapter(again, written) == options
    assert torch.equal(run(again, inputs), ours)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model = WanTransformer.load(GOLDENS / "head128" / "transformer")
    options = AttentionOptions(topk=0.4)
    trained(model, options, 2)
    _, inputs, _ = golden("transformer_sla")
    x, text, grads = inputs["hidden_states"], inputs["encoder_hidden_states"][:, :12], []
    for model.recompute in (False, True):
        out = model(x, inputs["timestep"], text, torch.ones(1, 12), model.tokens(x))
        parameters = [p for name, p in model.named_parameters() if ".sla." in name or ".lora_" in name]
        grads.append(torch.autograd.grad(out.square().mean(), parameters))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_tiles_reorder_what_blocks_see_and_nothing_else() -> None:
    model = WanTransformer.load(GOLDENS / "head128" / "transformer")
    _, inputs, _ = golden("transformer_sla")
    dense = run(model, inputs)
    everything = AttentionOptions(topk=1.0, negligible=0.0, block_q=16, block_k=16, tile=(2, 3, 4))
    model.adapt(everything)
    assert model.tokens(inputs["hidden_states"]).order is not None
    assert error(run(model, inputs), dense) < 2e-5
    model.adapt(AttentionOptions(topk=0.2, block_q=16, block_k=16, tile=(2, 3, 4)))
    tiled = run(model, inputs)
    model.adapt(AttentionOptions(topk=0.2, block_q=16, block_k=16))
    assert error(tiled, run(model, inputs)) > 1e-3
