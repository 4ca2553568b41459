"""Wan2.1's transformer, scaled down.  Module names give diffusers' WanTransformer3DModel state dict.

Latents [B, 16, F, 2h, 2w]; tokens L = F * h * w.  Text rows beyond a caption are zero and take part in
cross-attention as 512 - n equal keys; training sums them up as one key with weight 512 - n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Rope = tuple[Tensor, Tensor]  # cos and sin, each [L, head_dim / 2]


@dataclass(frozen=True)
class TransformerConfig:
    heads: int = 2
    head_dim: int = 128
    layers: int = 5
    ffn_dim: int = 768
    text_dim: int = 128
    channels: int = 16
    freq_dim: int = 256
    text_len: int = 512

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Rope:
    """cos and sin [L, head_dim / 2]: pairs of channels share an axis, t first, then y, then x."""
    spatial = 2 * (head_dim // 6)
    parts = []
    for axis, (size, dim) in enumerate(zip(grid, (head_dim - 2 * spatial, spatial, spatial))):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
        angles = torch.outer(torch.arange(size, dtype=torch.float64, device=device), 10000.0 ** (-steps / dim))
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        parts.append(angles.view(shape).expand(*grid, dim // 2))
    table = torch.cat(parts, -1).flatten(0, 2)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D], interleaved pairs."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    y = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return (y * (1 + scale) + shift).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(config.dim, config.dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(config.dim, eps=1e-6), nn.RMSNorm(config.dim, eps=1e-6)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, context: Tensor, rope: Rope | None, bias: Tensor | None) -> Tensor:
        """bias [B, 1, 1, Lk]: log of how many keys each key stands for."""
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k = self._heads(self.norm_q(q).to(v.dtype)), self._heads(self.norm_k(k).to(v.dtype))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, self._heads(v)))
        mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, q.shape[2], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class _GeluProjection(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.net = nn.ModuleList([_GeluProjection(dim, inner), nn.Identity(), nn.Linear(inner, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.dim
        self.attn1, self.attn2 = Attention(config), Attention(config)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, text: Tensor, tproj: Tensor, rope: Rope, bias: Tensor) -> Tensor:
        rows = (self.scale_shift_table + tproj.float())[:, :, None]  # [B, 6, 1, d]
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = rows.unbind(1)
        u = modulated_norm(x, shift_sa, scale_sa)
        x = (x.float() + gate_sa * self.attn1(u, u, rope, None)).to(x.dtype)
        x = x + self.attn2(self.norm2(x.float()).to(x.dtype), text, None, bias)
        u = modulated_norm(x, shift_ff, scale_ff)
        return (x.float() + gate_ff * self.ffn(u)).to(x.dtype)


class _Mlp(nn.Module):
    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, dim), nn.Linear(dim, dim)


class _ConditionEmbedder(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.time_embedder = _Mlp(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = _Mlp(config.text_dim, config.dim)


class WanTransformer(nn.Module):
    def __init__(self, config: TransformerConfig = TransformerConfig()):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.channels, config.dim, (1, 2, 2), (1, 2, 2))
        self.condition_embedder = _ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.proj_out = nn.Linear(config.dim, 4 * config.channels)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self._initialise()

    def _initialise(self) -> None:
        """Small gates and a zero head, so that training starts near the identity."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2 and "norm" not in name:
                nn.init.xavier_uniform_(p)
        nn.init.normal_(self.condition_embedder.time_proj.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)

    def _time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        half = self.config.freq_dim // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
        embedder = self.condition_embedder
        with torch.autocast(t.device.type, enabled=False):
            s = torch.cat([angles.cos(), angles.sin()], -1)
            temb = embedder.time_embedder.linear_2(F.silu(embedder.time_embedder.linear_1(s)))
            return temb, embedder.time_proj(F.silu(temb)).unflatten(1, (6, -1))

    def _text(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text rows and one row for all padding, with the log of each row's count."""
        text = torch.cat([text, torch.zeros_like(text[:, :1])], 1)
        mlp = self.condition_embedder.text_embedder
        context = mlp.linear_2(F.gelu(mlp.linear_1(text), approximate="tanh"))
        padding = torch.log(self.config.text_len - mask.sum(1, keepdim=True).float())
        bias = torch.cat([torch.where(mask.bool(), 0.0, -1e9), padding], 1)
        return context, bias[:, None, None, :]

    def rope(self, latents: Tensor) -> Rope:
        """The table for latents [B, 16, F, 2h, 2w]; computed once per size, outside compiled code."""
        f, h, w = latents.shape[2:]
        return rope_table((f, h // 2, w // 2), self.config.head_dim, latents.device)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, rope: Rope) -> Tensor:
        """x [B, 16, F, 2h, 2w], t [B] = 1000 sigma, text [B, n, text_dim], mask [B, n] -> velocity like x."""
        b, c, f, h, w = x.shape
        grid = (f, h // 2, w // 2)
        temb, tproj = self._time(t)
        context, bias = self._text(text, mask)
        y = self.patch_embedding(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            y = block(y, context, tproj, rope, bias)
        shift, scale = (self.scale_shift_table + temb[:, None]).unbind(1)
        y = self.proj_out(modulated_norm(y, shift[:, None], scale[:, None]))
        y = y.float().view(b, *grid, 2, 2, c).permute(0, 6, 1, 2, 4, 3, 5)
        return y.reshape(b, c, f, h, w)
