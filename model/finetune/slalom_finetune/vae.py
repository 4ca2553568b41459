"""Wan2.1's video VAE, whole clips at once.  Module names give the state dict of diffusers' AutoencoderKLWan.

Clips [B, 3, 4n + 1, H, W] in [-1, 1], latents [B, 16, n + 1, H / 8, W / 8], normalised as the transformer sees them.
The causal form equals the streamed one: 3x3x3 convolutions see two zero frames in front, and resampling in time
leaves the first frame alone.  For inference; nothing here is trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import load_config, load_folder


class CausalConv3d(nn.Conv3d):
    """Zero padding: symmetric in space, all in front in time."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int, int]):
        super().__init__(inputs, outputs, kernel)
        kt, kh, kw = self.kernel_size
        self._pad = (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self._pad))


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels (dimension 1)."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x.float(), dim=1) * (len(self.gamma) ** 0.5 * self.gamma.float())).to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(inputs, 3), CausalConv3d(inputs, outputs, 3)
        self.norm2, self.conv2 = ChannelNorm(outputs, 3), CausalConv3d(outputs, outputs, 3)
        self.conv_shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x)))))) + self.conv_shortcut(x)


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, frames, h, w = x.shape
        y = self.to_qkv(self.norm(x.transpose(1, 2).flatten(0, 1)))
        q, k, v = y.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        y = self.proj(y[:, 0].transpose(1, 2).unflatten(2, (h, w)))
        return x + y.unflatten(0, (b, frames)).transpose(1, 2)


class MidBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def _per_frame(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Downsample(nn.Module):
    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        x = _per_frame(self.resample, x)
        if self.time_conv is not None and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


class Upsample(nn.Module):
    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                      nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        if self.time_conv is not None and x.shape[2] > 1:
            b, c, frames, h, w = x.shape
            pairs = self.time_conv(x[:, :, 1:]).reshape(b, 2, c, frames - 1, h, w).permute(0, 2, 3, 1, 4, 5)
            x = torch.cat([x[:, :, :1], pairs.reshape(b, c, 2 * (frames - 1), h, w)], 2)
        return _per_frame(self.resample, x)


class UpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, count: int, upsample: Upsample | None):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(count)])
        self.upsamplers = nn.ModuleList([upsample]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if self.upsamplers else x


class Encoder(nn.Module):
    def __init__(self, widths: list[int], z_dim: int, count: int, temporal: list[bool]):
        super().__init__()
        self.conv_in, self.down_blocks = CausalConv3d(3, widths[0], 3), nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip([widths[0], *widths], widths)):
            self.down_blocks.extend(ResidualBlock(inputs if j == 0 else outputs, outputs) for j in range(count))
            if i < len(temporal):
                self.down_blocks.append(Downsample(outputs, temporal[i]))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out, self.conv_out = ChannelNorm(widths[-1], 3), CausalConv3d(widths[-1], 2 * z_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, widths: list[int], z_dim: int, count: int, temporal: list[bool]):
        super().__init__()
        widths, temporal = widths[::-1], temporal[::-1]
        self.conv_in, self.mid_block = CausalConv3d(z_dim, widths[0], 3), MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, outputs in enumerate(widths):
            inputs = widths[0] if i == 0 else widths[i - 1] // 2  # the upsampling in front halved the channels
            up = Upsample(outputs, temporal[i]) if i < len(temporal) else None
            self.up_blocks.append(UpBlock(inputs, outputs, count + 1, up))
        self.norm_out, self.conv_out = ChannelNorm(widths[-1], 3), CausalConv3d(widths[-1], 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class WanVae(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        z_dim, temporal = config["z_dim"], config["temperal_downsample"]
        widths = [config["base_dim"] * m for m in config["dim_mult"]]
        self.encoder = Encoder(widths, z_dim, config["num_res_blocks"], temporal)
        self.quant_conv = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(widths, z_dim, config["num_res_blocks"], temporal)
        self.register_buffer("mean", torch.tensor(config["latents_mean"]).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["latents_std"]).view(-1, 1, 1, 1), persistent=False)

    @classmethod
    def load(cls, folder: Path) -> WanVae:
        vae = cls(load_config(folder))
        state = load_folder(folder)
        if "quant_conv.weight" not in state:  # a folder for inference alone
            del vae.encoder, vae.quant_conv
        vae.load_state_dict(state)
        return vae.eval().requires_grad_(False)

    def encode(self, clips: Tensor) -> Tensor:
        """The mean of the posterior."""
        return (self.quant_conv(self.encoder(clips)).chunk(2, dim=1)[0].float() - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents * self.std + self.mean)).float().clamp(-1, 1)
