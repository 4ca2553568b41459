"""libslalom_attention.so by ctypes: the C ABI of kernels/c_api/slalom_attention.h."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from ctypes import c_double, c_int32, c_int64, c_size_t, c_void_p

import torch
from torch import Tensor

ABI = 1
ENVIRONMENT = "SLALOM_ATTENTION_LIBRARY"  # path of the library; "none": plain PyTorch
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
SCOPES = {"marginal": 0, "noncritical": 1, "all": 2}
FEATURE_MAPS = {"softmax": 0, "elu": 1, "relu": 2}
MAPS = {"topk": 0, "window": 1}
GATES = {"token": 0, "sample": 1}
OUT_OF_MEMORY = 8


def _struct(name: str, *groups: tuple[type, str]) -> type[ctypes.Structure]:
    members = [(field, kind) for kind, names in groups for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


_HEAD = ((c_size_t, "size"), (c_void_p, "stream"), (c_int64, "batch length heads head_size"), (c_int32, "dtype"))

SlaArgs = _struct(
    "SlaArgs", *_HEAD, (c_int32, "block_q block_k scope feature_map reserved"),
    (c_void_p, "q k v map proj_weight proj_bias out lse d_out d_q d_k d_v d_proj_weight d_proj_bias"))
SaladArgs = _struct(
    "SaladArgs", *_HEAD, (c_int32, "block_q block_k map_kind gate reserved"),
    (c_int64, "grid_frames grid_height grid_width"),
    (c_void_p, "q k v q_normed k_normed cos sin x map proj_weight proj_bias gate_weight gate_bias out lse gate_out "
               "d_out d_q d_k d_v d_q_normed d_k_normed d_x d_proj_weight d_proj_bias d_gate_weight d_gate_bias"))
MapArgs = _struct(
    "MapArgs", *_HEAD, (c_int32, "kind"), (c_double, "topk negligible"), (c_int32, "block_q block_k"),
    (c_int64, "grid_frames grid_height grid_width"), (c_void_p, "q k map"))


class Library:
    """The library and one context per device.  Thread-safe, as contexts are."""

    def __init__(self, path: str):
        self.path, self._dll = path, ctypes.CDLL(path)
        found = self._dll.slalom_attention_abi()
        if found != ABI:
            raise RuntimeError(f"{path} has ABI {found}, this package knows {ABI}")
        self._dll.slalom_context_error.restype = ctypes.c_char_p
        self._contexts: dict[str, c_void_p | None] = {}
        self._lock = threading.Lock()

    def context(self, device: torch.device) -> c_void_p | None:
        """None when the library was built without this kind of device."""
        name = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
        with self._lock:
            if name not in self._contexts:
                context, message = c_void_p(), ctypes.create_string_buffer(512)
                status = self._dll.slalom_context_create(name.encode(), 0, ctypes.byref(context), message, len(message))
                self._contexts[name] = context if status == 0 else None
            return self._contexts[name]

    def call(self, function: str, struct: type[ctypes.Structure], device: torch.device,
             tensors: dict[str, Tensor | None], **values: object) -> None:
        """Tensors must be contiguous, as they are passed by pointer alone."""
        for name, tensor in tensors.items():
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{function}: {name} is not contiguous")
        pointers = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        args, context = struct(size=ctypes.sizeof(struct), stream=stream, **values, **pointers), self.context(device)
        status = getattr(self._dll, function)(context, ctypes.byref(args))
        if status:
            why = (self._dll.slalom_context_error(context) or b"").decode(errors="replace")
            raise (torch.OutOfMemoryError if status == OUT_OF_MEMORY else RuntimeError)(f"{function}: {why}")


@functools.lru_cache(maxsize=1)
def library() -> Library | None:
    """The one that ENVIRONMENT names, or the loader's; None when there is none."""
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted == "none":
        return None
    try:
        return Library(wanted or "libslalom_attention.so")
    except OSError:
        if wanted:
            raise
        return None


def library_for(x: Tensor) -> Library | None:
    """The library, if it can compute on tensors like x; else plain PyTorch has to."""
    found = library() if x.dtype in DTYPES and x.device.type in ("cpu", "cuda") else None
    return found if found and found.context(x.device) else None


@torch.compiler.assume_constant_result
def has_library(dtype: torch.dtype, device: torch.device) -> bool:
    """The same question for code that torch.compile reads: the answer stays what it was at first."""
    return library_for(torch.empty(0, dtype=dtype, device=device)) is not None


def describe(device: torch.device) -> str:
    found = library_for(torch.empty(0, device=device))
    return f"attention by {found.path}" if found else "attention by plain PyTorch"
