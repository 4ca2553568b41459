"""The attention layers as PyTorch operators, with gradients, for eager code and torch.compile.

Tensors are [B, L, H, D], as the library has them; classes are a block map's, u8 [B, H, Nq, Nk], held fixed.
`slalom::block_map`, `slalom::sla` and `slalom::salad` are computed by libslalom_attention where it is there; without it
SLA is fallback.py's, and SALAD is composed of that and of plain PyTorch (salad.py).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import block_map, fallback
from .library import (DTYPES, FEATURE_MAPS, GATES, MAPS, SCOPES, MapArgs, SaladArgs, SlaArgs, library_for)
from .options import AttentionOptions


def _sizes(q: Tensor) -> dict[str, int]:
    b, length, heads, width = q.shape
    return {"batch": b, "length": length, "heads": heads, "head_size": width, "dtype": DTYPES[q.dtype]}


def _swapped(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """As the library takes them: contiguous, and on 16 bytes, which slices and mapped files need not be."""
    dense = [None if x is None else x.contiguous() for x in tensors]
    return [x.clone() if x is not None and x.data_ptr() % 16 else x for x in dense]


def _lse(q: Tensor) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide)


@torch.library.custom_op("slalom::block_map", mutates_args=())
def block_map_op(q: Tensor, k: Tensor, kind: str, topk: float, negligible: float, block_q: int, block_k: int) -> Tensor:
    """q, k after rotation -> classes u8 [B, H, Nq, Nk]; of windows only the sizes matter.  No gradient."""
    b, length, heads, _ = q.shape
    options = AttentionOptions(topk=topk, negligible=negligible, block_q=block_q, block_k=block_k)
    if kind == "window":
        return block_map.window_map(b, heads, length, options, q.device).contiguous()
    found = library_for(q)
    if found is None:
        return block_map.topk_map(*_swapped(q, k), options)
    q, k = _dense(q, k)
    classes = _classes(q, block_q, block_k)
    found.call("slalom_make_map", MapArgs, q.device, {"q": q, "k": k, "map": classes}, **_sizes(q), kind=MAPS[kind],
               topk=topk, negligible=negligible, block_q=block_q, block_k=block_k)
    return classes


def _classes(q: Tensor, block_q: int, block_k: int) -> Tensor:
    b, length, heads, _ = q.shape
    return q.new_empty(b, heads, block_map.blocks(length, block_q), block_map.blocks(length, block_k), dtype=torch.uint8)


@block_map_op.register_fake
def _(q, k, kind, topk, negligible, block_q, block_k):  # noqa: ANN001, ANN202
    return _classes(q, block_q, block_k)


def classes_of(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    """The map that `options` ask for; q, k [B, L, H, D]."""
    return block_map_op(q.detach(), k.detach(), options.map, options.topk, options.negligible, options.block_q,
                        options.block_k)


@torch.library.custom_op("slalom::sla", mutates_args=())
def sla_op(q: Tensor, k: Tensor, v: Tensor, classes: Tensor, weight: Optional[Tensor], bias: Optional[Tensor],
           scope: str, feature_map: str, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """out [B, L, H, D], lse [B, H, L]; weight [D, D] and bias [D] float32, or None: no linear branch."""
    found = library_for(q)
    if found is None:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = fallback.sla_forward(*_swapped(q, k, v), classes, weight, bias, scope, feature_map, block_q,
                                            block_k)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    q, k, v, classes, weight, bias = _dense(q, k, v, classes, weight, bias)
    out, lse = torch.empty_like(q), _lse(q)
    found.call("slalom_sla_forward", SlaArgs, q.device,
               {"q": q, "k": k, "v": v, "map": classes, "proj_weight": weight, "proj_bias": bias, "out": out,
                "lse": lse},
               **_sizes(q), block_q=block_q, block_k=block_k, scope=SCOPES[scope], feature_map=FEATURE_MAPS[feature_map])
    return out, lse


@sla_op.register_fake
def _(q, k, v, classes, weight, bias, scope, feature_map, block_q, block_k):  # noqa: ANN001, ANN202
    return q.new_empty(q.shape), _lse(q)


@torch.library.custom_op("slalom::sla_backward", mutates_args=())
def sla_backward_op(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, classes: Tensor, weight: Optional[Tensor],
                    bias: Optional[Tensor], out: Tensor, lse: Tensor, scope: str, feature_map: str, block_q: int,
                    block_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weight and bias; the last two are empty without weight."""
    found = library_for(q)
    if found is None:
        with torch.autocast(q.device.type, enabled=False):
            *grads, d_weight, d_bias = fallback.sla_backward(
                *_swapped(d_out, q, k, v), classes, weight, lse, scope, feature_map, block_q, block_k)
        return *(g.transpose(1, 2).contiguous() for g in grads), d_weight, d_bias
    d_out, q, k, v, classes, weight, bias, out, lse = _dense(d_out, q, k, v, classes, weight, bias, out, lse)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    d_weight, d_bias = _parameter_grads(q, weight, bias)
    found.call("slalom_sla_backward", SlaArgs, q.device,
               {"q": q, "k": k, "v": v, "map": classes, "proj_weight": weight, "proj_bias": bias, "out": out,
                "lse": lse, "d_out": d_out, "d_q": grads[0], "d_k": grads[1], "d_v": grads[2],
                "d_proj_weight": None if weight is None else d_weight,
                "d_proj_bias": None if weight is None else d_bias},
               **_sizes(q), block_q=block_q, block_k=block_k, scope=SCOPES[scope], feature_map=FEATURE_MAPS[feature_map])
    return *grads, d_weight, d_bias


def _parameter_grads(q: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    return [q.new_empty(0, dtype=torch.float32) if p is None else torch.empty_like(p) for p in parameters]


@sla_backward_op.register_fake
def _(d_out, q, k, v, classes, weight, bias, out, lse, scope, feature_map, block_q, block_k):  # noqa: ANN001, ANN202
    return *(x.new_empty(x.shape) for x in (q, k, v)), *_parameter_grads(q, weight, bias)


def _save_sla(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ctx.scope, ctx.feature_map, ctx.block_q, ctx.block_k = inputs
    ctx.save_for_backward(*tensors, *output)


def _sla_backward(ctx, d_out: Tensor, d_lse: Tensor | None):  # noqa: ANN001, ANN202
    *tensors, out, lse = ctx.saved_tensors
    grads = sla_backward_op(d_out, *tensors, out, lse, ctx.scope, ctx.feature_map, ctx.block_q, ctx.block_k)
    d_weight, d_bias = (None, None) if tensors[4] is None else grads[3:]
    return *grads[:3], None, d_weight, d_bias, None, None, None, None


sla_op.register_autograd(_sla_backward, setup_context=_save_sla)


# --- SALAD, by the library alone ---


def _salad_call(function: str, q: Tensor, tensors: dict[str, Tensor | None], grid: list[int], map_kind: str, gate: str,
                block_q: int, block_k: int) -> None:
    library_for(q).call(function, SaladArgs, q.device, tensors, **_sizes(q), block_q=block_q, block_k=block_k,
                        map_kind=MAPS[map_kind], gate=GATES[gate],
                        **dict(zip(("grid_frames", "grid_height", "grid_width"), grid)))


_SALAD_INPUTS = ("q", "k", "v", "q_normed", "k_normed", "cos", "sin", "x", "map", "proj_weight", "proj_bias",
                 "gate_weight", "gate_bias")


@torch.library.custom_op("slalom::salad", mutates_args=())
def salad_op(q: Tensor, k: Tensor, v: Tensor, q_normed: Tensor, k_normed: Tensor, cos: Tensor, sin: Tensor, x: Tensor,
             classes: Tensor, proj_weight: Tensor, proj_bias: Tensor, gate_weight: Tensor, gate_bias: Tensor,
             grid: list[int], map_kind: str, gate: str, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """out [B, L, d] before the o projection, lse [B, H, L].  proj_weight has q's type, the other parameters f32."""
    inputs = dict(zip(_SALAD_INPUTS, _dense(q, k, v, q_normed, k_normed, cos, sin, x, classes, proj_weight, proj_bias,
                                            gate_weight, gate_bias)))
    out, lse = x.new_empty(x.shape), _lse(q)
    _salad_call("slalom_salad_forward", q, {**inputs, "out": out, "lse": lse}, grid, map_kind, gate, block_q, block_k)
    return out, lse


@salad_op.register_fake
def _(q, k, v, q_normed, k_normed, cos, sin, x, *rest):  # noqa: ANN001, ANN002, ANN202
    return x.new_empty(x.shape), _lse(q)


@torch.library.custom_op("slalom::salad_backward", mutates_args=())
def salad_backward_op(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_normed: Tensor, k_normed: Tensor, cos: Tensor,
                      sin: Tensor, x: Tensor, classes: Tensor, proj_weight: Tensor, proj_bias: Tensor,
                      gate_weight: Tensor, gate_bias: Tensor, out: Tensor, lse: Tensor, grid: list[int], map_kind: str,
                      gate: str, block_q: int, block_k: int) -> list[Tensor]:
    """Gradients of q, k, v, q_normed, k_normed, x and of the four parameters (all float32)."""
    inputs = dict(zip(_SALAD_INPUTS, _dense(q, k, v, q_normed, k_normed, cos, sin, x, classes, proj_weight, proj_bias,
                                            gate_weight, gate_bias)))
    grads = {f"d_{name}": torch.empty_like(inputs[name]) for name in ("q", "k", "v", "q_normed", "k_normed", "x")}
    grads |= {f"d_{name}": torch.empty_like(inputs[name], dtype=torch.float32) for name in _SALAD_INPUTS[9:]}
    d_out, out, lse = _dense(d_out, out, lse)
    _salad_call("slalom_salad_backward", q, {**inputs, "out": out, "lse": lse, "d_out": d_out, **grads}, grid, map_kind,
                gate, block_q, block_k)
    return list(grads.values())


@salad_backward_op.register_fake
def _(d_out, q, k, v, q_normed, k_normed, cos, sin, x, classes, *rest):  # noqa: ANN001, ANN002, ANN202
    return ([t.new_empty(t.shape) for t in (q, k, v, q_normed, k_normed, x)]
            + [t.new_empty(t.shape, dtype=torch.float32) for t in rest[:4]])


def _save_salad(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ctx.grid, ctx.map_kind, ctx.gate, ctx.block_q, ctx.block_k = inputs
    ctx.save_for_backward(*tensors, *output)


def _salad_backward(ctx, d_out: Tensor, d_lse: Tensor | None):  # noqa: ANN001, ANN202
    d_q, d_k, d_v, d_qn, d_kn, d_x, *parameters = salad_backward_op(
        d_out, *ctx.saved_tensors, ctx.grid, ctx.map_kind, ctx.gate, ctx.block_q, ctx.block_k)
    parameters[0] = parameters[0].to(ctx.saved_tensors[9].dtype)
    return d_q, d_k, d_v, d_qn, d_kn, None, None, d_x, None, *parameters, None, None, None, None, None


salad_op.register_autograd(_salad_backward, setup_context=_save_salad)
