"""The video decoder: diffusers' AutoencoderKLWan.decode, which streams one latent frame a pass."""

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from .common import fill, must_matter, normal, round_to_bf16

SOURCE = "diffusers AutoencoderKLWan.decode"


def run(model, latents):
    with torch.no_grad():
        return model.decode(latents, return_dict=False)[0]


def write(goldens, case, model, latents, folder_name):
    golden = run(model, latents)
    outputs = {"sample": golden,
               "sample_bf16": run(model.bfloat16(), latents.bfloat16())}
    model.float()
    goldens.write(case, ["vae_decoder"], {"latents": latents}, outputs, folder_name, SOURCE)
    return golden


def mutations(model, latents, golden):
    decoder = model.decoder
    for what, p, value in (
            ("a residual block's gamma", decoder.up_blocks[1].resnets[0].norm1.gamma, 1),
            ("the attention's gamma", decoder.mid_block.attentions[0].norm.gamma, 1),
            ("a time convolution's bias", decoder.up_blocks[0].upsamplers[0].time_conv.bias, 0),
            ("the shortcut", decoder.up_blocks[1].resnets[0].conv_shortcut.weight, 0)):
        kept = p.detach().clone()
        with torch.no_grad():
            p.fill_(value)
            must_matter(what, run(model, latents), golden)
            p.copy_(kept)
    # Every frame alone: the caches must matter.
    alone = torch.cat([run(model, latents[:, :, t : t + 1]) for t in range(latents.shape[2])], 2)
    must_matter("the frames before", alone, golden[:, :, [0, 4, 8][: alone.shape[2]]])


def make(goldens):
    # The encoder is dropped: it would double the file, and nothing here reads it.
    model = round_to_bf16(fill(AutoencoderKLWan(base_dim=6, z_dim=16), 21))
    with torch.no_grad():  # keep most of the output inside the clamp
        model.decoder.conv_out.weight.mul_(0.7)
        round_to_bf16(model.decoder.conv_out)
    folder = goldens.model("odd") / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    tensors = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items()
               if k.startswith(("decoder.", "post_quant_conv."))}
    save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"), {"format": "pt"})

    latents = normal(22, "latents", 1, 16, 3, 2, 5)
    golden = write(goldens, "vae_decoder", model, latents, "odd")
    clamped = float((golden.abs() >= 1).float().mean())
    print(f"    clamped: {clamped:.1%} of the pixels, std {float(golden.std()):.2f}")
    assert 0 < clamped < 0.2, "the clamp must act, on few pixels"
    mutations(model, latents, golden)
    write(goldens, "vae_decoder_one_frame", model, normal(23, "one", 1, 16, 1, 2, 4), "odd")


def make_demo(goldens, demo):
    model = AutoencoderKLWan.from_pretrained(demo / "vae", torch_dtype=torch.float32).eval()
    latents = normal(24, "demo", 1, model.config.z_dim, 2, 4, 6)
    write(goldens, "demo_vae_decoder", model, latents, "demo")
