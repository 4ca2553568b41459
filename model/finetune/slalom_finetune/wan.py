"""Wan2.1's diffusion transformer.  Module names give the state dict of diffusers' WanTransformer3DModel.

Latents [B, 16, F, 2h, 2w]; tokens L = F h w.  Text rows behind a prompt are zero and take part in cross-attention,
as 512 - n equal keys; here one key stands for all of them, with the log of their number as its bias.  The residual
stream, norms and the time path are float32, as in Wan's own code and in slalomd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .files import load_config, load_folder
from .lora import LoraLinear
from .options import RASTER, AttentionOptions
from .rope import Rope, rope_table, rotate
from .salad import SaladAttention
from .sla import SparseLinearAttention
from .token_order import Grid, inverse, tile_order


@dataclass(frozen=True)
class WanConfig:
    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    text_len: int = 512
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def load(cls, folder: Path) -> WanConfig:
        stored = load_config(folder)
        unlike = {"patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
                  "added_kv_proj_dim": None, "image_dim": None}
        for key, value in unlike.items():
            if stored.get(key, value) != value:
                raise ValueError(f"{folder}: {key} is {stored[key]}, which no Wan2.1 text-to-video model has")
        return cls(**{key: stored[key] for key in cls.__dataclass_fields__ if key in stored})


@dataclass(frozen=True)
class Tokens:
    """The geometry of a batch: its grid, its rotation, and the order of its tokens if it isn't raster."""

    grid: Grid
    rope: Rope
    order: Tensor | None = None  # int64 [L]: raster index of each token
    back: Tensor | None = None


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift


class Attention(nn.Module):
    """Projections and norms of self- or cross-attention; `sla` or `salad` may stand in for the softmax."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads, dim = config.num_attention_heads, config.dim
        self.to_q, self.to_k, self.to_v = (LoraLinear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([LoraLinear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, config.eps), nn.RMSNorm(dim, config.eps)
        self.sla: SparseLinearAttention | None = None
        self.salad: SaladAttention | None = None

    def project(self, x: Tensor, context: Tensor, adapted: bool) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.to_q(x, adapted), self.to_k(context, adapted), self.to_v(context, adapted)
        q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)
        return tuple(t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))

    def cross(self, x: Tensor, text: Tensor, bias: Tensor, adapted: bool) -> Tensor:
        """bias [B, 1, 1, n]: log of how many keys each key stands for."""
        q, k, v = (t.transpose(1, 2) for t in self.project(x, text, adapted))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.to_out[0](y.transpose(1, 2).flatten(2), adapted)

    def self_attention(self, x: Tensor, tokens: Tokens, adapted: bool) -> Tensor:
        """`adapted` False: the dense attention of the base model, without LoRA."""
        q, k, v = self.project(x, x, adapted)
        if adapted and self.salad is not None:
            return self.to_out[0](self.salad(x, q, k, v, tokens.rope, tokens.grid), True)
        q, k = (rotate(t, tokens.rope) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if adapted and self.sla is not None:
            y = self.sla(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2), adapted)


class _GeluProjection(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = LoraLinear(inputs, outputs)

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        return F.gelu(self.proj(x, adapted), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.net = nn.ModuleList([_GeluProjection(dim, inner), nn.Identity(), LoraLinear(inner, dim)])

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        return self.net[2](self.net[0](x, adapted), adapted)


class Block(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.attn1, self.attn2 = Attention(config), Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.eps = config.eps

    def forward(self, x: Tensor, text: Tensor, tproj: Tensor, tokens: Tokens, bias: Tensor, adapted: bool) -> Tensor:
        """x [B, L, d] float32"""
        rows = (self.scale_shift_table.float() + tproj)[:, :, None]  # [B, 6, 1, d]
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = rows.unbind(1)
        u = modulated_norm(x, shift_sa, scale_sa, self.eps).to(text.dtype)
        x = x + gate_sa * self.attn1.self_attention(u, tokens, adapted).float()
        norm = self.norm2
        u = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), self.eps).to(text.dtype)
        x = x + self.attn2.cross(u, text, bias, adapted).float()
        u = modulated_norm(x, shift_ff, scale_ff, self.eps).to(text.dtype)
        return x + gate_ff * self.ffn(u, adapted).float()


class _Mlp(nn.Module):
    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, dim), nn.Linear(dim, dim)


class _ConditionEmbedder(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.time_embedder = _Mlp(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = _Mlp(config.text_dim, config.dim)


class WanTransformer(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.config, self.tile, self.recompute = config, RASTER, False
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, (1, 2, 2), (1, 2, 2))
        self.condition_embedder = _ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(config.dim, 4 * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))

    @classmethod
    def load(cls, folder: Path) -> WanTransformer:
        """From a diffusers folder (with config.json), in float32."""
        model = cls(WanConfig.load(folder))
        state = load_folder(folder)
        weight = "patch_embedding.weight"  # some conversions flatten the convolution
        state[weight] = state[weight].view_as(model.patch_embedding.weight)
        model.load_state_dict(state)
        return model

    def adapt(self, options: AttentionOptions) -> None:
        """Puts untrained SLA or SALAD in the place of every self-attention.  `adapted` calls use it."""
        head_dim = self.config.attention_head_dim
        if options.layer_topk and len(options.layer_topk) != len(self.blocks):
            raise ValueError(f"{len(options.layer_topk)} values of layer_topk for {len(self.blocks)} layers")
        for layer, block in enumerate(self.blocks):
            own = options.of_layer(layer)
            block.attn1.sla = SparseLinearAttention.of(head_dim, own) if options.kind == "sla" else None
            block.attn1.salad = None if options.kind == "sla" else SaladAttention.of(
                self.config.num_attention_heads, head_dim, own, layer)
        self.tile = options.tile
        self.to(self.proj_out.weight.device)

    def tokens(self, latents: Tensor) -> Tokens:
        """Of latents [B, 16, F, 2h, 2w]; made once per size, outside compiled code."""
        f, h, w = latents.shape[2:]
        grid, device = (f, h // 2, w // 2), latents.device
        rope = rope_table(grid, self.config.attention_head_dim, device)
        if self.tile == RASTER:
            return Tokens(grid, rope)
        order = tile_order(grid, self.tile).to(device)
        return Tokens(grid, (rope[0][order], rope[1][order]), order, inverse(order))

    def _time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        half = self.config.freq_dim // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
        embedder = self.condition_embedder
        with torch.autocast(t.device.type, enabled=False):
            s = torch.cat([angles.cos(), angles.sin()], -1)
            temb = embedder.time_embedder.linear_2(F.silu(embedder.time_embedder.linear_1(s)))
            return temb, embedder.time_proj(F.silu(temb)).unflatten(1, (6, -1))

    def _text(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded rows and one more that stands for all the zero rows, with each row's bias."""
        text = torch.cat([text, torch.zeros_like(text[:, :1])], 1)
        mlp = self.condition_embedder.text_embedder
        context = mlp.linear_2(F.gelu(mlp.linear_1(text), approximate="tanh"))
        padding = torch.log(self.config.text_len - mask.sum(1, keepdim=True).float())  # -inf: there is none
        bias = torch.cat([torch.where(mask.bool(), 0.0, -torch.inf), padding], 1)
        return context, bias[:, None, None, :]

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, tokens: Tokens,
                adapted: bool = True, keep_blocks: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """x [B, 16, F, 2h, 2w], t [B] = 1000 sigma, text [B, n, text_dim], mask [B, n] (1 on real rows) ->
        velocity like x, float32; with keep_blocks also every block's output [B, L, d], in the tokens' order."""
        b, _, f, h, w = x.shape
        temb, tproj = self._time(t)
        context, bias = self._text(text, mask)
        y = self.patch_embedding(x).flatten(2).transpose(1, 2).float()
        if tokens.order is not None:
            y = y[:, tokens.order]
        kept = []
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                y = checkpoint(block, y, context, tproj, tokens, bias, adapted, use_reentrant=False)
            else:
                y = block(y, context, tproj, tokens, bias, adapted)
            kept += [y] if keep_blocks else []
        if tokens.back is not None:
            y = y[:, tokens.back]
        shift, scale = (self.scale_shift_table.float() + temb[:, None]).unbind(1)
        y = self.proj_out(modulated_norm(y, shift[:, None], scale[:, None], self.config.eps).to(context.dtype))
        y = y.float().view(b, f, h // 2, w // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, f, h, w)
        return (y, kept) if keep_blocks else y
