"""The Wan2.1 video VAE, scaled down, for training: whole clips at once instead of a streamed cache.

Module names give the state-dict names of diffusers' AutoencoderKLWan.  Clips are [B, 3, F, H, W] in
[-1, 1] with F = 4n + 1, latents [B, 16, n + 1, H / 8, W / 8].  The causal form used here equals the
streamed one: every 3x3x3 convolution sees two zero frames in front, and the temporal resampling
leaves the first frame alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VaeConfig:
    base_dim: int = 16
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


class CausalConv3d(nn.Conv3d):
    """Zero padding: symmetric in space, all in front in time.

    `planar` computes the same as a 2-D convolution of frames that carry the frames before them as
    further channels; on some devices and sizes that is faster (forms.py).
    """

    planar = False

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int, int]):
        super().__init__(inputs, outputs, kernel)
        kt, kh, kw = self.kernel_size
        self.pad = (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self._planar(x) if self.planar else super().forward(F.pad(x, self.pad))

    def _planar(self, x: Tensor) -> Tensor:
        b, _, frames, h, w = x.shape
        kt, kh, kw = self.kernel_size
        past = F.pad(x, (0, 0, 0, 0, kt - 1, 0))
        stacked = torch.cat([past[:, :, i:i + frames] for i in range(kt)], 1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        y = F.conv2d(stacked.transpose(1, 2).flatten(0, 1), weight, self.bias, padding=(kh // 2, kw // 2))
        return y.unflatten(0, (b, frames)).transpose(1, 2)


class RmsNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels (dimension 1)."""

    def __init__(self, channels: int, dims: int = 3):
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x.float(), dim=1) * (self.scale * self.gamma)).to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = RmsNorm(inputs), CausalConv3d(inputs, outputs, 3)
        self.norm2, self.conv2 = RmsNorm(outputs), CausalConv3d(outputs, outputs, 3)
        self.conv_shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a block starts as its shortcut
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.conv_shortcut(x)


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RmsNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, f, h, w = x.shape
        y = self.norm(x.transpose(1, 2).reshape(b * f, c, h, w))
        q, k, v = self.to_qkv(y).reshape(b * f, 1, 3 * c, h * w).transpose(2, 3).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        y = self.proj(y.transpose(2, 3).reshape(b * f, c, h, w))
        return x + y.reshape(b, f, c, h, w).transpose(1, 2)


class Resample(nn.Module):
    """Halves or doubles height and width, and time if `temporal`."""

    def __init__(self, channels: int, up: bool, temporal: bool):
        super().__init__()
        self.up = up
        if up:
            self.resample = nn.Sequential(
                nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1))
            self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if temporal else None
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def _double_time(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2T - 1, H, W]; the first frame stays as it is."""
        if x.shape[2] == 1:
            return x
        b, c, t, h, w = x.shape
        pairs = self.time_conv(x[:, :, 1:]).reshape(b, 2, c, t - 1, h, w)
        return torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * (t - 1), h, w)], 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up and self.time_conv is not None:
            x = self._double_time(x)
        b, _, t = x.shape[:3]
        y = self.resample(x.transpose(1, 2).flatten(0, 1))
        x = y.reshape(b, t, *y.shape[1:]).transpose(1, 2)
        if not self.up and self.time_conv is not None and t > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class UpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int, upsample: Resample | None):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)])
        self.upsamplers = nn.ModuleList([upsample]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if self.upsamplers else x


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(3, dims[0], 3)
        self.down_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip(dims[:-1], dims[1:])):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(inputs, outputs))
                inputs = outputs
            if i < len(config.temporal_downsample):
                self.down_blocks.append(Resample(outputs, up=False, temporal=config.temporal_downsample[i]))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out, self.conv_out = RmsNorm(dims[-1]), CausalConv3d(dims[-1], 2 * config.z_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        dims = [config.base_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        temporal = config.temporal_downsample[::-1]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip(dims[:-1], dims[1:])):
            upsample = Resample(outputs, up=True, temporal=temporal[i]) if i < len(temporal) else None
            # The upsampling in front of it has halved the channels.
            self.up_blocks.append(
                UpBlock(inputs // 2 if i > 0 else inputs, outputs, config.num_res_blocks + 1, upsample))
        self.norm_out, self.conv_out = RmsNorm(dims[-1]), CausalConv3d(dims[-1], 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class WanVae(nn.Module):
    def __init__(self, config: VaeConfig = VaeConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, each [B, z, f, h, w]."""
        return self.quant_conv(self.encoder(clip)).chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """[B, 3, F, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(z))


def channels_last(vae: WanVae) -> WanVae:
    """Changes the memory layout of the weights, not their values: what NVIDIA's convolutions like best."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae
