"""Adapters as slalomd reads them: model/adapter.h says which tensors a file may hold."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .files import read_metadata, save_tensors, write_atomically
from .options import AttentionOptions
from .wan import WanTransformer

_PARTS = (".attn1.sla.", ".attn1.salad.", ".lora_A.", ".lora_B.")


def is_adapter_tensor(name: str) -> bool:
    return any(part in name for part in _PARTS)


def adapter_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if is_adapter_tensor(name)}


def lora_linears(where: str) -> tuple[str, ...]:
    """The layers of a block that carry LoRA.  Cross-attention's k and v do not: they belong to the prompt, which clips
    of every kind of attention share."""
    attention = tuple(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    return attention if where == "self" else (*attention, "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")


def add_lora(model: WanTransformer, rank: int, seed: int, where: str = "self") -> None:
    """`where`: "self", q, k, v and o of every self-attention; "all", the other layers too."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for name in lora_linears(where):
            block.get_submodule(name).add_lora(rank, generator)


def save_adapter(state: dict[str, Tensor], options: AttentionOptions, folder: Path, notes: dict[str, str]) -> Path:
    """Writes FOLDER/attention/{sla,salad,linear}.safetensors, in bf16; `linear` is for sample.py alone."""
    path = folder / "attention" / f"{options.kind if options.topk else 'linear'}.safetensors"
    tensors = {name: value.to(torch.bfloat16) for name, value in adapter_state(state).items()}
    save_tensors(tensors, path, {"format": "pt", **options.to_metadata(), **notes})
    return path


def load_adapter(model: WanTransformer, path: Path) -> AttentionOptions:
    """Adapts the model and gives it the file's weights."""
    options = AttentionOptions.from_metadata(read_metadata(path))
    tensors = load_file(path)
    model.adapt(options)
    linears = {f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in lora_linears("all")}
    for name, value in tensors.items():
        linear, _, part = name.rpartition(".lora_A.")
        if part and linear in linears:
            model.get_submodule(linear).add_lora(value.shape[0], torch.Generator())
    expected = set(adapter_state(model.state_dict()))
    if expected != set(tensors):
        raise ValueError(f"{path}: does not fit the model: {sorted(expected ^ set(tensors))[:4]}")
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    return options


def start_from(model: WanTransformer, path: Path) -> None:
    """An adapter's weights for a model that is adapted already.  What the file lacks stays as it is."""
    tensors, there = load_file(path), adapter_state(model.state_dict())
    if unlike := [name for name, value in tensors.items() if name not in there or there[name].shape != value.shape]:
        raise ValueError(f"{path}: does not fit this plan: {unlike[:4]}")
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)


def save_transformer(state: dict[str, Tensor], source: Path, folder: Path) -> Path:
    """A whole transformer whose base weights were trained: FOLDER/transformer, in bf16, one file."""
    tensors = {name: value.to(torch.bfloat16) for name, value in state.items() if not is_adapter_tensor(name)}
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_tensors(tensors, path, {"format": "pt"})
    config = (source / "config.json").read_bytes()
    write_atomically(path.with_name("config.json"), lambda part: part.write_bytes(config) and None)
    return path
