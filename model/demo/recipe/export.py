"""Writes the trained networks as a model folder in the diffusers layout.

    python export.py --vae vae.pt --denoiser denoiser.pt --out ..
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from text_encoder import TextConfig
from tokenizer import VOCAB_SIZE
from training import averaged_weights
from transformer import TransformerConfig
from vae import VaeConfig

SHARDS = 2


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def bf16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().to(torch.bfloat16).contiguous() for name, value in state.items()}


def save_weights(state: dict[str, Tensor], folder: Path, stem: str = "diffusion_pytorch_model") -> None:
    """One file, in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(bf16(state), folder / f"{stem}.safetensors")


def _save(state: dict[str, Tensor], file: Path) -> None:
    """The file is whole or not there."""
    part = file.with_suffix(".tmp")
    save_file(state, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(file)


def save_sharded(state: dict[str, Tensor], folder: Path, stem: str) -> None:
    """SHARDS files of about equal size, in bf16, and the index that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = bf16(state)
    sizes = {name: value.numel() * value.element_size() for name, value in state.items()}
    total, taken = sum(sizes.values()), 0
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    for name, value in state.items():
        shards[min(taken * SHARDS // total, SHARDS - 1)][name] = value
        taken += sizes[name]
    names = [f"{stem}-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    for file, shard in zip(names, shards):
        _save(shard, folder / file)
    where = {name: file for file, shard in zip(names, shards) for name in shard}
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def transformer_config(config: TransformerConfig) -> dict:
    return {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": config.heads,
            "attention_head_dim": config.head_dim, "in_channels": config.channels, "out_channels": config.channels,
            "text_dim": config.text_dim, "freq_dim": config.freq_dim, "ffn_dim": config.ffn_dim,
            "num_layers": config.layers, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-06,
            "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None}


def vae_config(config: VaeConfig, mean: Tensor, std: Tensor) -> dict:
    return {"_class_name": "AutoencoderKLWan", "base_dim": config.base_dim, "z_dim": config.z_dim,
            "dim_mult": list(config.dim_mult), "num_res_blocks": config.num_res_blocks, "attn_scales": [],
            "temperal_downsample": list(config.temporal_downsample), "dropout": 0.0,
            "latents_mean": [round(v, 6) for v in mean.tolist()], "latents_std": [round(v, 6) for v in std.tolist()]}


def text_config(config: TextConfig) -> dict:
    return {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": config.vocab_size,
            "d_model": config.d_model, "d_kv": config.d_kv, "d_ff": config.d_ff, "num_layers": config.num_layers,
            "num_heads": config.num_heads, "relative_attention_num_buckets": config.buckets,
            "relative_attention_max_distance": config.max_distance, "dropout_rate": 0.0, "layer_norm_epsilon": 1e-06,
            "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "use_cache": False, "pad_token_id": 0,
            "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}


SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "solver_order": 2,
             "solver_type": "bh2", "predict_x0": True, "prediction_type": "flow_prediction", "use_flow_sigmas": True,
             "flow_shift": 3.0, "lower_order_final": True, "final_sigmas_type": "zero"}
INDEX = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"],
         "vae": ["diffusers", "AutoencoderKLWan"], "text_encoder": ["transformers", "UMT5EncoderModel"],
         "tokenizer": ["transformers", "T5TokenizerFast"], "scheduler": ["diffusers", "UniPCMultistepScheduler"]}
DEFAULTS = {"name": "demo",
            "defaults": {"width": 256, "height": 256, "num_frames": 33, "fps": 16, "steps": 20, "guidance_scale": 3.0,
                         "flow_shift": 3.0, "sampler": "unipc", "attention": "sla"},
            "limits": {"max_width": 512, "max_height": 512, "max_frames": 65, "max_pixels": 512 * 512 * 49,
                       "max_steps": 100, "max_prompt_bytes": 2048}}


def save_denoiser(state: dict[str, Tensor], out: Path) -> None:
    """Transformer, text encoder and all configurations: a model folder but for the VAE's weights."""
    config = TextConfig()
    assert config.vocab_size == VOCAB_SIZE
    parts = {name: {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}
             for name in ("text", "transformer")}
    save_sharded(parts["transformer"], out / "transformer", "diffusion_pytorch_model")
    write_json(out / "transformer" / "config.json", transformer_config(TransformerConfig()))
    write_json(out / "vae" / "config.json", vae_config(VaeConfig(), state["mean"], state["std"]))
    save_weights(parts["text"], out / "text_encoder", "model")
    write_json(out / "text_encoder" / "config.json", text_config(config))
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", INDEX)
    write_json(out / "slalom.json", DEFAULTS)


def load_denoiser(folder: Path) -> dict[str, Tensor]:
    """What save_denoiser wrote, as a Denoiser's state in float32."""
    state: dict[str, Tensor] = {}
    for name, prefix in (("transformer", "transformer."), ("text_encoder", "text.")):
        for file in sorted((folder / name).glob("*.safetensors")):
            state |= {prefix + k: v.float() for k, v in load_file(file).items()}
    config = json.loads((folder / "vae" / "config.json").read_text())
    return state | {"mean": torch.tensor(config["latents_mean"]), "std": torch.tensor(config["latents_std"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--denoiser", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    save_weights(averaged_weights(arguments.vae), arguments.out / "vae")
    save_denoiser(averaged_weights(arguments.denoiser), arguments.out)
