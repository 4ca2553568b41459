"""Text encoder, VAE, sampler and noise: against the goldens of transformers and diffusers, and slalomd's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_attention import cases, error, golden

from slalom_finetune.noise import _philox, normal
from slalom_finetune.prepare import read_clip
from slalom_finetune.sample import Sampler, unipc, write_clip
from slalom_finetune.text import TextEncoder
from slalom_finetune.vae import WanVae

DEMO = ROOT / "model" / "demo"
ODD = ROOT / "tests" / "parity" / "goldens" / "odd"


def model_of(case: str):  # noqa: ANN201
    return DEMO if case.startswith("demo") else ODD


@pytest.mark.parametrize("case", ["demo_text_encoder", *cases("text_encoder")])
def test_text_encoder_is_transformers(case: str) -> None:
    _, inputs, outputs = golden(case)
    model = TextEncoder.load(model_of(case) / "text_encoder")
    for ids, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], outputs["last_hidden_state"]):
        count = int(mask.sum())
        assert error(model(ids[:count]), expected[:count]) < 1e-5


@pytest.mark.parametrize("case", ["demo_vae_decoder", *cases("vae_decoder")])
def test_vae_decoder_is_diffusers(case: str) -> None:
    _, inputs, outputs = golden(case)
    vae = WanVae.load(model_of(case) / "vae")
    assert error(vae.decode((inputs["latents"] - vae.mean) / vae.std), outputs["sample"]) < 2e-5


def test_vae_encoder_is_the_decoder_s_other_half() -> None:
    vae = WanVae.load(DEMO / "vae")
    t, y, x = torch.meshgrid(torch.arange(9), torch.arange(64), torch.arange(64), indexing="ij")
    ball = ((x - 16 - 3 * t) ** 2 + (y - 32) ** 2 < 150).float()
    clip = torch.stack([0.8 * ball - 0.2, 0.3 - 0.6 * ball + y / 200, 0.1 - 0.5 * ball])[None]
    latents = vae.encode(clip)
    assert latents.shape == (1, 16, 3, 8, 8) and 0.3 < float(latents.std()) < 3
    noise = (vae.decode(latents) - clip).square().mean()
    assert float(10 * torch.log10(4 / noise)) > 20
    alone = vae.encode(clip[:, :, :5])
    assert error(alone, latents[:, :, :2]) < 1e-4  # causal


@pytest.mark.parametrize("case", [case for case in cases("sampler") if "unipc" in case])
def test_unipc_is_diffusers(case: str) -> None:
    options, inputs, outputs = golden(case)
    given = iter(inputs["velocities"])
    seen = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return next(given)

    last = unipc(velocity, inputs["latents"], int(options["steps"]), float(options["shift"]))
    assert seen == outputs["timesteps"].tolist()
    assert error(last, outputs["latents"][-1]) < 1e-4


def test_noise_is_philox() -> None:
    """The known answer of Salmon et al.'s library, as in tests/unit/kernels."""
    words = _philox(0, 0, np.zeros(1, np.uint64))[0]
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    drawn = normal(7, (4, 5001))
    assert torch.equal(drawn.flatten()[:11], normal(7, (11,)))
    assert not torch.equal(drawn[0, :8], normal(8, (8,))) and not torch.equal(drawn[0, :8], normal(7, (8,), stream=1))
    assert abs(float(drawn.mean())) < 0.02 and abs(float(drawn.std()) - 1) < 0.02


def test_clips_go_through_ffmpeg(tmp_path) -> None:  # noqa: ANN001
    frames = torch.zeros(6, 48, 64, 3, dtype=torch.uint8)
    frames[..., 0] = torch.arange(6)[:, None, None] * 40
    write_clip(frames, tmp_path / "clip.mp4", 16)
    clip = read_clip(tmp_path / "clip.mp4", 5, 32, 32)
    assert clip.shape == (3, 5, 32, 32)
    assert abs(float(clip[0, 4].mean()) - (160 / 127.5 - 1)) < 0.05
    assert read_clip(tmp_path / "clip.mp4", 9, 32, 32) is None


def test_untrained_attention_takes_blocks_and_boxes_and_an_adapter_only_topk() -> None:
    device = torch.device("cpu")
    untrained = Sampler(DEMO, None, "sla", device, topk=0.25, block_q=16, block_k=16, tile=(2, 1, 8)).transformer
    options = untrained.blocks[0].attn1.sla.options
    assert (options.topk, options.block_q, options.block_k, untrained.tile) == (0.25, 16, 16, (2, 1, 8))
    adapter = DEMO / "attention" / "sla.safetensors"
    trained = Sampler(DEMO, adapter, "sla", device, topk=0.5).transformer
    assert [block.attn1.sla.options.topk for block in trained.blocks] == [0.5] * len(trained.blocks)
    with pytest.raises(ValueError, match="an adapter has its own block_q"):
        Sampler(DEMO, adapter, "sla", device, block_q=32)
