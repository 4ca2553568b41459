"""Captions to embeddings: UMT5's encoder under the state-dict names of HF's UMT5EncoderModel, and its tokens."""

from __future__ import annotations

import html
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import load_config, load_folder

END, UNKNOWN = 1, 3


def position_buckets(length: int, buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """[length, length]: T5's bidirectional bucket of key position minus query position."""
    half, exact = buckets // 2, buckets // 4
    position = torch.arange(length, device=device)
    relative = position[None, :] - position[:, None]
    distance = relative.abs()
    far = exact + (torch.log(distance.clamp(min=1).double() / exact) / math.log(max_distance / exact)
                   * (half - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=half - 1)) + half * (relative > 0)


class _RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(self.weight.dtype)


class _SelfAttention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        inner, self.heads = c["num_heads"] * c["d_kv"], c["num_heads"]
        self.q, self.k, self.v = (nn.Linear(c["d_model"], inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c["d_model"], bias=False)
        self.relative_attention_bias = nn.Embedding(c["relative_attention_num_buckets"], c["num_heads"])

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # T5 has no 1 / sqrt(d)
        return self.o(y.transpose(1, 2).flatten(2))


class _GatedMlp(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(c["d_model"], c["d_ff"], bias=False) for _ in range(2))
        self.wo = nn.Linear(c["d_ff"], c["d_model"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class _AttentionLayer(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.SelfAttention, self.layer_norm = _SelfAttention(c), _RmsNorm(c["d_model"], c["layer_norm_epsilon"])


class _MlpLayer(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.DenseReluDense, self.layer_norm = _GatedMlp(c), _RmsNorm(c["d_model"], c["layer_norm_epsilon"])


class _Block(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(c), _MlpLayer(c)])


class _Stack(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.block = nn.ModuleList([_Block(c) for _ in range(c["num_layers"])])
        self.final_layer_norm = _RmsNorm(c["d_model"], c["layer_norm_epsilon"])


class TextEncoder(nn.Module):
    """Runs one prompt's real tokens alone, so that there is no mask."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config["vocab_size"], config["d_model"])
        self.encoder = _Stack(config)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
        state = load_folder(folder)
        state.pop("encoder.embed_tokens.weight", None)  # tied
        with torch.device("meta"):
            model = cls(load_config(folder))
        model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
        return model.eval().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [n] or, several prompts of one length, [B, n] -> [..., n, d_model]"""
        x = self.shared(ids.reshape(-1, ids.shape[-1]))
        buckets = position_buckets(ids.shape[-1], self.config["relative_attention_num_buckets"],
                                   self.config["relative_attention_max_distance"], ids.device)
        for attention, mlp in (block.layer for block in self.encoder.block):
            x = x + attention.SelfAttention(attention.layer_norm(x), buckets)
            x = x + mlp.DenseReluDense(mlp.layer_norm(x))
        return self.encoder.final_layer_norm(x).view(*ids.shape, -1)


class Tokenizer:
    """As Hugging Face's T5 tokenizer: word by word; an unknown stretch is one id 3.  Needs sentencepiece.

    Captions are cleaned by html.unescape and by collapsing white space; slalomd also repairs what ftfy would
    (full-width forms, curly quotes, ...): write such captions plainly.
    """

    def __init__(self, folder: Path):
        from sentencepiece import SentencePieceProcessor
        self._pieces = SentencePieceProcessor(model_file=str(folder / "spiece.model"))

    def encode(self, caption: str, length: int = 512) -> Tensor:
        ids: list[int] = []
        unknown = self._pieces.unk_id()
        for word in html.unescape(html.unescape(caption)).split():
            for one in self._pieces.encode(word):
                one = UNKNOWN if one == unknown else one
                if one != UNKNOWN or not ids or ids[-1] != UNKNOWN:
                    ids.append(one)
        return torch.tensor([*ids[:length - 1], END])
