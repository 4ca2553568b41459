"""SLA in plain PyTorch, for machines without libslalom_attention: forward, and the backward pass with the map held.

Tensors are [B, H, L, D].  Everything is computed in float32 (float64 when the inputs are), on the keys of the
critical blocks alone, gathered for a few query blocks at a time, so that memory grows with L and not with L^2.
On a GPU factors of matrix products stay in bfloat16 where the inputs are: sums, softmax and denominators are float32.
The formulas are those of SLA (arXiv 2509.24006, sections 3 and 4 and appendix).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_map import CRITICAL, MARGINAL, blocks, critical_lists

EPSILON = 1e-5  # in the linear branch's denominator
GATHERED = {"cpu": 1 << 22, "cuda": 1 << 28}  # elements of gathered keys at a time


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@cache
def _sums_widely(device: str) -> bool:
    """Whether products of bfloat16 come in float32 there."""
    x = torch.ones(1, 16, 16, dtype=torch.bfloat16, device=device)
    try:
        return torch.bmm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


def _factor(x: Tensor, like: Tensor) -> Tensor:
    """x as a factor of products: in `like`'s type where those can be summed in float32, else as wide as the sums."""
    keeps = like.dtype == torch.bfloat16 and _sums_widely(like.device.type)
    return x.to(torch.bfloat16) if keeps else x.to(_wide(like).dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two factors, in float32 (float64 when they are)."""
    if a.dtype != torch.bfloat16:
        return a @ b
    found = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return found.view(*a.shape[:-1], b.shape[-1])


def in_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, L, D] -> [B, H, N, block, D], contiguous, zeros behind the end."""
    count = blocks(x.shape[-2], block)
    return F.pad(x, (0, 0, 0, count * block - x.shape[-2])).contiguous().unflatten(-2, (count, block))


def out_of_blocks(x: Tensor, length: int) -> Tensor:
    return x.flatten(-3, -2)[..., :length, :]


def features(x: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return torch.softmax(x, -1)
    return F.elu(x) + 1 if kind == "elu" else torch.relu(x)


def features_backward(d: Tensor, x: Tensor, phi: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return phi * (d - (d * phi).sum(-1, keepdim=True))
    return d * torch.where(x > 0, 1.0, phi) if kind == "elu" else d * (x > 0)


class _Sparse:
    """The softmax branch: what forward and backward share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, classes: Tensor, block_q: int, block_k: int):
        """q, k, v as factors."""
        self.length, self.scale = q.shape[-2], q.shape[-1] ** -0.5
        self.q, self.k, self.v = in_blocks(q, block_q), in_blocks(k, block_k), in_blocks(v, block_k)
        self.block_k, self.lists = block_k, critical_lists(classes)
        heads = self.k.shape[:2].numel()
        first = torch.arange(heads, device=q.device).view(*self.k.shape[:2], 1, 1) * self.k.shape[2]
        self.rows = self.lists.clamp(min=0) + first  # of the keys' blocks of all heads in one row

    def chunks(self) -> Iterator[slice]:
        per_block = self.lists.shape[-1] * self.block_k * self.k.shape[-1] * self.k.shape[:2].numel()
        size = max(1, GATHERED.get(self.q.device.type, 1 << 22) // max(per_block, 1))
        return (slice(i, i + size) for i in range(0, self.q.shape[2], size))

    def gather(self, x: Tensor, part: slice) -> Tensor:
        """[B, H, Nk, block_k, D] -> [B, H, n, M * block_k, D]."""
        rows = self.rows[:, :, part]
        return x.flatten(0, 2)[rows.flatten()].view(*rows.shape[:3], -1, x.shape[-1])

    def scatter(self, d: Tensor, part: slice, into: Tensor) -> None:
        rows = self.rows[:, :, part].flatten()
        into.flatten(0, 2).index_add_(0, rows, d.reshape(len(rows), self.block_k, -1))

    def scores(self, part: slice, keys: Tensor) -> Tensor:
        """-inf where there is no key."""
        lists = self.lists[:, :, part]
        position = lists[..., None] * self.block_k + torch.arange(self.block_k, device=lists.device)
        there = ((lists >= 0)[..., None] & (position < self.length)).flatten(-2)[..., None, :]
        return (_product(self.q[:, :, part], keys.mT) * self.scale).masked_fill(~there, -torch.inf)

    def forward(self) -> tuple[Tensor, Tensor]:
        outs, sums = [_wide(self.q[:, :, :0])], [_wide(self.q[:, :, :0, :, 0])]
        for part in self.chunks():
            scores = self.scores(part, self.gather(self.k, part))
            lse = scores.logsumexp(-1)
            outs.append(_product(_factor(_probabilities(scores, lse), self.q), self.gather(self.v, part)))
            sums.append(lse)
        return out_of_blocks(torch.cat(outs, 2), self.length), torch.cat(sums, 2).flatten(2)[..., :self.length]

    def backward(self, d_out: Tensor, lse: Tensor, block_q: int) -> tuple[Tensor, Tensor, Tensor]:
        d_out, lse = in_blocks(d_out, block_q), in_blocks(lse[..., None], block_q)[..., 0]
        d_q, d_k, d_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (self.q, self.k, self.v))
        for part in self.chunks():
            keys, values, d_o = self.gather(self.k, part), self.gather(self.v, part), d_out[:, :, part]
            p = _probabilities(self.scores(part, keys), lse[:, :, part])
            d_p = _product(d_o, values.mT)
            d_s = _factor(p * (d_p - (p * d_p).sum(-1, keepdim=True)) * self.scale, self.q)
            d_q[:, :, part] = _product(d_s, keys)
            self.scatter(_product(_factor(p, self.q).mT, d_o), part, d_v)
            self.scatter(_product(d_s.mT, self.q[:, :, part]), part, d_k)
        return tuple(out_of_blocks(d, self.length) for d in (d_q, d_k, d_v))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Zero in rows without any key, whose lse is -inf."""
    return torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])


class _Linear:
    """The linear branch, O_l = phi(Q) H / (phi(Q) z + 1e-5), H and z summed over the key blocks in scope."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, classes: Tensor, scope: str, feature_map: str,
                 block_q: int, block_k: int):
        """q, k wide; v as a factor."""
        self.length = length = q.shape[-2]
        if scope == "all":  # every row sees every key: as one block
            block_q = block_k = length
            mask = torch.ones(*q.shape[:2], 1, 1, device=q.device)
        else:
            mask = classes != CRITICAL if scope == "noncritical" else classes == MARGINAL
        self.mask, self.block_q, self.block_k, self.feature_map = mask.to(q.dtype), block_q, block_k, feature_map
        self.mask_factor = _factor(self.mask, v)
        self.q, self.k, self.v = q, k, in_blocks(v, block_k)
        phi_k = in_blocks(features(k, feature_map), block_k)
        self.phi_q = _factor(in_blocks(features(q, feature_map), block_q), v)
        self.phi_k, self.sums = _factor(phi_k, v), phi_k.sum(-2)  # sums [B, H, Nk, D]
        self.states = self.phi_k.mT @ self.v  # [B, H, Nk, D, D]

    def chunks(self) -> Iterator[slice]:
        size = max(1, GATHERED.get(self.q.device.type, 1 << 22) // self.states[:, :, :1].numel())
        return (slice(i, i + size) for i in range(0, self.phi_q.shape[2], size))

    def part(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """H [.., n, D, D], z [.., n, 1, D], 1 / denominator [.., n, block_q, 1] and O_l of some query blocks."""
        phi = self.phi_q[:, :, part]
        h = (self.mask_factor[:, :, part] @ self.states.flatten(-2)).unflatten(-1, self.states.shape[-2:])
        z = (self.mask[:, :, part] @ self.sums)[..., None, :]
        inverse = 1 / ((phi * z).sum(-1, keepdim=True) + EPSILON)
        return h, z, inverse, _product(phi, h) * inverse

    def forward(self) -> Tensor:
        return out_of_blocks(torch.cat([self.part(part)[3] for part in self.chunks()], 2), self.length)

    def backward(self, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, and O_l once more."""
        d_out, outs = in_blocks(d_out, self.block_q), [_wide(self.phi_q[:, :, :0])]
        d_phi_q = torch.zeros_like(self.phi_q, dtype=d_out.dtype)
        d_states, d_sums = torch.zeros_like(self.states), torch.zeros_like(self.sums)
        for part in self.chunks():
            h, z, inverse, out = self.part(part)
            outs.append(out)
            d_o, mask = d_out[:, :, part], self.mask_factor[:, :, part]
            delta = (d_o * out).sum(-1, keepdim=True)
            d_phi_q[:, :, part] = (_product(_factor(d_o, self.v), h.mT) - delta * z) * inverse
            weighted = self.phi_q[:, :, part] * inverse
            d_h = _factor(weighted, self.v).mT @ _factor(d_o, self.v)
            d_states += (mask.mT @ d_h.flatten(-2)).view_as(d_states)
            d_sums -= self.mask[:, :, part].mT @ (weighted * delta).sum(-2)
        d_phi_k = _product(self.v, d_states.mT) + d_sums[..., None, :]
        d_q, d_k = (features_backward(out_of_blocks(d, self.length), x, features(x, self.feature_map),
                                      self.feature_map) for d, x in ((d_phi_q, self.q), (d_phi_k, self.k)))
        d_v, out = _product(self.phi_k, d_states), torch.cat(outs, 2)
        return d_q, d_k, out_of_blocks(d_v, self.length), out_of_blocks(out, self.length)


def sla_forward(q: Tensor, k: Tensor, v: Tensor, classes: Tensor, weight: Tensor | None, bias: Tensor | None,
                scope: str, feature_map: str, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """out like q, lse [B, H, L].  Without `weight` there is no linear branch."""
    out, lse = _Sparse(*(_factor(x, q) for x in (q, k, v)), classes, block_q, block_k).forward()
    if weight is not None:
        linear = _Linear(_wide(q), _wide(k), _factor(v, q), classes, scope, feature_map, block_q, block_k).forward()
        out = out + linear @ weight.to(out.dtype).T + bias.to(out.dtype)
    return out.to(q.dtype), lse


def sla_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, classes: Tensor, weight: Tensor | None, lse: Tensor,
                 scope: str, feature_map: str, block_q: int, block_k: int) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, with `weight`, of weight and bias (else empty)."""
    factors, d_o = [_factor(x, q) for x in (q, k, v)], _wide(d_out)
    grads = list(_Sparse(*factors, classes, block_q, block_k).backward(_factor(d_o, q), lse, block_q))
    d_weight, d_bias = d_o.new_empty(0), d_o.new_empty(0)
    if weight is not None:
        branch = _Linear(_wide(q), _wide(k), factors[2], classes, scope, feature_map, block_q, block_k)
        *more, linear = branch.backward(d_o @ weight.to(d_o.dtype))
        d_weight = torch.einsum("bhln,bhlm->nm", d_o, linear).to(weight.dtype)
        d_bias = d_o.sum((0, 1, 2)).to(weight.dtype)
        for grad, part in zip(grads, more):
            grad += part
    return *(grad.to(q.dtype) for grad in grads), d_weight, d_bias
