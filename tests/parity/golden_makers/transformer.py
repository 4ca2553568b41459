"""The diffusion transformer: diffusers' WanTransformer3DModel, dense and with sparse attention.

Two models:
  odd      3 heads of 24, F32 in two shards
  head128  1 head of 128, BF16 in one file, with an SLA and a SALAD adapter
"""

import json

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from . import salad, sla
from .common import fill, must_matter, normal, round_to_bf16, token_rows, write_json

TEXT_LEN = 512
SOURCE = "diffusers WanTransformer3DModel"


def make_model(seed, **config):
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=16, out_channels=16, text_dim=16,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
        **config)
    return fill(model, seed)


def make_inputs(seed, batch, grid, timesteps, text_rows, text_dim=16):
    frames, height, width = grid
    return {
        "hidden_states": normal(seed, "hidden_states", batch, 16, frames, height, width),
        "timestep": torch.tensor(timesteps, dtype=torch.float32),
        "encoder_hidden_states": token_rows(seed, "text", batch, text_rows, TEXT_LEN, text_dim),
    }


def run(model, inputs):
    with torch.no_grad():
        return model(inputs["hidden_states"], inputs["timestep"],
                     inputs["encoder_hidden_states"], return_dict=False)[0]


def run_bf16(folder, inputs):
    """As the diffusers pipeline runs it: bf16 weights, the modules that it keeps in f32 in f32."""
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    inputs = {k: v if k == "timestep" else v.bfloat16() for k, v in inputs.items()}
    return run(model, inputs)


def mutations(model, inputs, golden):
    """Each of these once went wrong in some implementation (or easily could)."""

    def without(what, change):
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            change(model)
        must_matter(what, run(model, inputs), golden)
        model.load_state_dict(kept)

    block = model.blocks[0]
    without("the cross attention norm's weight", lambda m: block.norm2.weight.fill_(1))
    without("the cross attention norm's bias", lambda m: block.norm2.bias.zero_())
    without("norm_q of self attention", lambda m: block.attn1.norm_q.weight.fill_(1))
    without("norm_k of cross attention", lambda m: block.attn2.norm_k.weight.fill_(1))
    without("a block's modulation table", lambda m: block.scale_shift_table.zero_())
    without("the head's modulation table", lambda m: m.scale_shift_table.zero_())
    without("the value bias", lambda m: block.attn1.to_v.bias.zero_())
    without("the first text layer's bias",
            lambda m: m.condition_embedder.text_embedder.linear_1.bias.zero_())
    cut = dict(inputs, encoder_hidden_states=inputs["encoder_hidden_states"][:, :40])
    must_matter("the zero text rows", run(model, cut), golden)
    shifted = dict(inputs, timestep=inputs["timestep"] + 1)
    must_matter("one unit of the timestep", run(model, shifted), golden, 1e-3)


def dense_case(goldens, name, model, folder, inputs, folder_name, shared=None):
    golden = run(model, inputs)
    outputs = {"sample": golden, "sample_bf16": run_bf16(folder, inputs)}
    goldens.write(name, ["transformer", "--attention", "dense"], inputs, outputs, folder_name,
                  SOURCE, shared)
    return golden


def make_odd(goldens):
    model = make_model(1, num_attention_heads=3, attention_head_dim=24, num_layers=2, ffn_dim=80,
                       freq_dim=128)
    folder = goldens.model("odd") / "transformer"
    model.save_pretrained(folder, max_shard_size="400KB")
    inputs = make_inputs(2, 2, (3, 6, 10), [999.0, 421.5], [7, 31])
    golden = dense_case(goldens, "transformer_odd", model, folder, inputs, "odd")
    mutations(model, inputs, golden)
    one = make_inputs(3, 1, (1, 2, 14), [60.0], [1])
    dense_case(goldens, "transformer_one_frame", model, folder, one, "odd")
    write_json(goldens.model("odd") / "model_index.json",
               {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"],
                "vae": ["diffusers", "AutoencoderKLWan"],
                "text_encoder": ["transformers", "UMT5EncoderModel"],
                "tokenizer": ["transformers", "T5TokenizerFast"],
                "scheduler": ["diffusers", "UniPCMultistepScheduler"]})


def make_adapter(goldens, kind, settings, tensors):
    folder = goldens.model("head128") / "attention"
    folder.mkdir(exist_ok=True)
    save_file({k: v.bfloat16().contiguous() for k, v in tensors.items()},
              str(folder / f"{kind}.safetensors"),
              {"slalom.attention": json.dumps({"kind": kind, **settings})})


def make_head128(goldens):
    model = round_to_bf16(
        make_model(4, num_attention_heads=1, attention_head_dim=128, num_layers=2, ffn_dim=64,
                   freq_dim=256))
    folder = goldens.model("head128") / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    save_file({k: v.bfloat16().contiguous() for k, v in model.state_dict().items()},
              str(folder / "diffusion_pytorch_model.safetensors"), {"format": "pt"})
    inputs = make_inputs(5, 1, (5, 10, 12), [853.0], [12])  # 150 tokens: 3 blocks, the last ragged
    dense = dense_case(goldens, "transformer_head128", model, folder, inputs, "head128",
                       "transformer_head128")

    settings = {"topk": 0.4, "negligible": 0.0, "scope": "all", "feature_map": "softmax",
                "block_q": 64, "block_k": 64, "dropped_layers": []}
    tensors = {}
    for n in range(2):
        prefix = f"blocks.{n}.attn1.sla.proj_l"
        tensors[f"{prefix}.weight"] = normal(6, f"{prefix}.weight", 128, 128, std=0.1)
        tensors[f"{prefix}.bias"] = normal(6, f"{prefix}.bias", 128, std=0.1)
    make_adapter(goldens, "sla", settings, tensors)
    sla.install(model, tensors, settings)
    sample = run(model, inputs)
    must_matter("SLA", dense, sample)
    goldens.write("transformer_sla", ["transformer", "--attention", "sla"], inputs,
                  {"sample": sample}, "head128", SOURCE + ", attention by thu-ml/SLA main",
                  "transformer_head128")

    settings = {"topk": 0.4, "block_q": 64, "block_k": 64, "map": "topk", "gate": "token",
                "dropped_layers": [1]}
    prefix = "blocks.0.attn1.salad"
    tensors = {
        f"{prefix}.proj.weight": normal(7, "proj.weight", 128, 128, std=0.1),
        f"{prefix}.proj.bias": normal(7, "proj.bias", 128, std=0.1),
        f"{prefix}.gate.weight": normal(7, "gate.weight", 1, 128, std=0.2),
        f"{prefix}.gate.bias": normal(7, "gate.bias", 1, std=0.2),
    }
    make_adapter(goldens, "salad", settings, tensors)
    salad.install(model, tensors, settings, (5, 5, 6))
    sample = run(model, inputs)
    must_matter("SALAD", dense, sample)
    goldens.write("transformer_salad", ["transformer", "--attention", "salad"], inputs,
                  {"sample": sample}, "head128", SOURCE + ", attention by salad.py",
                  "transformer_head128")


def make(goldens):
    make_odd(goldens)
    make_head128(goldens)


def make_demo(goldens, demo):
    """One forward of the shipped model on a small input."""
    folder = demo / "transformer"
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    inputs = make_inputs(8, 1, (2, 6, 10), [731.0], [9], model.config.text_dim)
    goldens.write("demo_transformer", ["transformer", "--attention", "dense"], inputs,
                  {"sample": run(model, inputs), "sample_bf16": run_bf16(folder, inputs)}, "demo",
                  SOURCE)
