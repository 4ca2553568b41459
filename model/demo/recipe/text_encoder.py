"""UMT5's encoder, scaled down.  Module names give the state-dict names of HF's UMT5EncoderModel.

No score scaling, a relative position bias in every layer, RMSNorm, gated GELU.  Trained together with
the transformer, on batches of equal padded length with a key mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 320
    d_model: int = 128
    num_layers: int = 2
    num_heads: int = 2
    d_kv: int = 64
    d_ff: int = 256
    buckets: int = 32
    max_distance: int = 128


def position_buckets(length: int, config: TextConfig, device: torch.device) -> Tensor:
    """[length, length] int64: T5's bidirectional bucket of key position minus query position."""
    half, exact = config.buckets // 2, config.buckets // 4
    position = torch.arange(length, device=device)
    relative = position[None, :] - position[:, None]
    distance = relative.abs()
    far = exact + (torch.log(distance.clamp(min=1) / exact) / math.log(config.max_distance / exact)
                   * (half - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=half - 1)) + half * (relative > 0)


class RmsNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(config.buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None] + mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class _AttentionLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.SelfAttention, self.layer_norm = SelfAttention(config), RmsNorm(config.d_model)


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.DenseReluDense, self.layer_norm = GatedFeedForward(config), RmsNorm(config.d_model)


class _Block(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config), _FeedForwardLayer(config)])


class _Stack(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.block = nn.ModuleList([_Block(config) for _ in range(config.num_layers)])
        self.final_layer_norm = RmsNorm(config.d_model)


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)
        for name, p in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(p, std=0.5 if "shared" in name else 0.1 if "bias" in name else p.shape[-1] ** -0.5)
        for block in self.encoder.block:  # no score scaling: the factor sits in q's weights
            block.layer[0].SelfAttention.q.weight.data.mul_(config.d_kv**-0.5)

    @torch.no_grad()
    def look_around(self) -> None:
        """Tables of relative positions to begin with: in the first layer a head looks at the word before and one at the
        word after, in the others a few words to each side.  From small tables, order is learned very late."""
        half = self.config.buckets // 2  # buckets of keys before the query, then of keys after it
        for i, block in enumerate(self.encoder.block):
            table = block.layer[0].SelfAttention.relative_attention_bias.weight.zero_()
            reach = 2 if i == 0 else 6
            table[1:reach, 0::2] = 4.0
            table[half + 1:half + reach, 1::2] = 4.0

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, n] (1 on real tokens) -> [B, n, d_model]; rows beyond the mask are zero."""
        x = self.shared(ids)
        buckets = position_buckets(ids.shape[1], self.config, ids.device)
        key_mask = torch.where(mask.bool(), 0.0, -1e9)[:, None, None, :]
        for block in self.encoder.block:
            attention, feed_forward = block.layer
            x = x + attention.SelfAttention(attention.layer_norm(x), buckets, key_mask)
            x = x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))
        return self.encoder.final_layer_norm(x) * mask[..., None]
