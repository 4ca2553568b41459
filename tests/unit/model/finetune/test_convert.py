"""TurboDiffusion checkpoints: made here from a small diffusers model, by Wan's own names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_wan import GOLDENS, run, trained
from torch import Tensor

from slalom_finetune import AttentionOptions
from slalom_finetune.adapter import load_adapter
from slalom_finetune.convert import convert, diffusers_name
from slalom_finetune.wan import WanTransformer

# diffusers -> Wan, one per kind of tensor, as the table of names in the format's description has them
WAN_NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0", "condition_embedder.text_embedder.linear_2":
    "text_embedding.2", "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2", "condition_embedder.time_proj": "time_projection.1",
    "attn1.sla.proj_l": "self_attn.attn_op.local_attn.proj_l", "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v", "attn1.to_out.0": "self_attn.o", "attn1.norm": "self_attn.norm",
    "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o", "attn2.norm": "cross_attn.norm", "norm2": "norm3", "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2", "proj_out": "head.head",
}


def wan_name(name: str) -> str:
    if name.endswith("scale_shift_table"):
        return name.replace("scale_shift_table", "modulation" if name.startswith("blocks") else "head.modulation")
    for ours, theirs in WAN_NAMES.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name


def checkpoint(model: WanTransformer) -> dict[str, Tensor]:
    state = {wan_name(name): value.bfloat16() for name, value in model.state_dict().items()}
    state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    return state


def model_with_sla() -> tuple[WanTransformer, AttentionOptions]:
    model = WanTransformer.load(GOLDENS / "head128" / "transformer")
    options = AttentionOptions("sla", 0.3, 0.0, "all", block_q=32, block_k=16)
    trained(model, options, 0)
    return model, options


def inputs() -> dict[str, Tensor]:
    return load_file(GOLDENS / "cases" / "transformer_head128.in.safetensors")


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_checkpoint_becomes_a_folder_that_computes_the_same(tmp_path: Path, prefix: str) -> None:
    model, options = model_with_sla()
    state = {prefix + name: value for name, value in checkpoint(model).items()}
    torch.save({"state_dict": state} if prefix else state, tmp_path / "turbo.pth")
    transformer, adapter = convert(tmp_path / "turbo.pth", tmp_path / "out", 0.3, 32, 16)
    assert transformer.exists()
    again = WanTransformer.load(tmp_path / "out" / "transformer")
    assert again.config == model.config
    assert load_adapter(again, adapter) == options
    assert torch.equal(run(again, inputs()), run(model, inputs()))


def test_int8_weights_are_widened(tmp_path: Path) -> None:
    model, _ = model_with_sla()
    state, name = checkpoint(model), "blocks.0.self_attn.q"
    weight = state.pop(f"{name}.weight").float()
    scale = weight.abs().max() / 128
    state[f"{name}.int8_weight"] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    state[f"{name}.scale"] = scale.view(1, 1)
    torch.save(state, tmp_path / "quant.pth")
    convert(tmp_path / "quant.pth", tmp_path, 0.1, 128, 64)
    found = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")["blocks.0.attn1.to_q.weight"]
    assert float((found.float() - weight).abs().max()) < 1.01 * float(scale)


def test_names_of_others_are_refused(tmp_path: Path) -> None:
    model, _ = model_with_sla()
    torch.save({**checkpoint(model), "blocks.0.hidden.surprise": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="surprise"):
        convert(tmp_path / "a.pth", tmp_path, 0.1, 128, 64)
    assert diffusers_name("blocks.3.norm3.weight") == "blocks.3.norm2.weight"


class Payload:
    def __reduce__(self):  # noqa: ANN204
        return os.mkdir, ("should_never_exist",)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        convert(tmp_path / "evil.pth", tmp_path, 0.1, 128, 64)
    assert not (tmp_path / "should_never_exist").exists()
