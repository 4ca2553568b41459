"""TurboDiffusion's checkpoints (.pth) as a diffusers transformer and an SLA adapter, in safetensors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from .files import save_tensors, write_atomically
from .options import AttentionOptions

_NAMES = (  # Wan's own -> diffusers; note that norm2 and norm3 swap
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.self_attn\.attn_op\.local_attn\.proj_l\.", r"\1.attn1.sla.proj_l."),
    (r"^(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"^(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"^(blocks\.\d+)\.self_attn\.norm_", r"\1.attn1.norm_"),
    (r"^(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"^(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"^(blocks\.\d+)\.cross_attn\.norm_", r"\1.attn2.norm_"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
)
_KNOWN = re.compile(r"^(patch_embedding|condition_embedder|scale_shift_table|proj_out|blocks\.\d+\."
                    r"(scale_shift_table|attn[12]|norm2|ffn\.net))\b")


def diffusers_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        found, count = re.subn(pattern, replacement, name)
        if count:
            return found
    return name


def dequantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`X.int8_weight` with `X.scale` (one per 128 x 128) becomes `X.weight` in bf16."""
    found = {name: value for name, value in state.items() if not name.endswith((".int8_weight", ".scale"))}
    for name in (n for n in state if n.endswith(".int8_weight")):
        linear, weight = name.removesuffix(".int8_weight"), state[name]
        scale = state[f"{linear}.scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        found[f"{linear}.weight"] = (weight.float() * scale[:weight.shape[0], :weight.shape[1]]).bfloat16()
    return found


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors under diffusers' names.  Nothing but tensors is ever unpickled."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a flat dictionary of tensors")
    state = dequantised({name.removeprefix("net."): value for name, value in state.items()})
    named = {diffusers_name(name): value for name, value in state.items()}
    if unknown := [name for name in named if not _KNOWN.match(name)]:
        raise ValueError(f"{path}: unknown tensors: {', '.join(sorted(unknown)[:4])}")
    return named


def transformer_config(state: dict[str, Tensor], head_dim: int = 128) -> dict:
    """config.json, from the shapes."""
    dim, channels = state["proj_out.weight"].shape[1], state["proj_out.weight"].shape[0] // 4
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    return {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": dim // head_dim,
            "attention_head_dim": head_dim, "in_channels": channels, "out_channels": channels,
            "text_dim": state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": state["blocks.0.ffn.net.0.proj.weight"].shape[0], "num_layers": layers, "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None,
            "rope_max_seq_len": 1024, "pos_embed_seq_len": None}


def convert(path: Path, out: Path, topk: float, block_q: int, block_k: int, head_dim: int = 128) -> list[Path]:
    """Writes OUT/transformer and, when the checkpoint has SLA, OUT/attention/sla.safetensors.

    The checkpoint does not hold topk and the block sizes; TurboDiffusion's scope is every key.
    """
    state = read_checkpoint(path)
    sla = {name: value for name, value in state.items() if ".sla." in name}
    base = {name: value for name, value in state.items() if name not in sla}
    config = transformer_config(base, head_dim)
    weight = "patch_embedding.weight"
    base[weight] = base[weight].reshape(-1, config["in_channels"], 1, 2, 2)
    written = [out / "transformer" / "diffusion_pytorch_model.safetensors"]
    save_tensors(base, written[0], {"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(out / "transformer" / "config.json", lambda part: part.write_text(text) and None)
    if sla:
        options = AttentionOptions("sla", topk, 0.0, "all", block_q=block_q, block_k=block_k)
        written.append(out / "attention" / "sla.safetensors")
        save_tensors(sla, written[1], {"format": "pt", **options.to_metadata()})
    return written
