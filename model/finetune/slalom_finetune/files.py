"""Files that are whole or not there, and a model folder's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` gets a name beside `path`; the file takes its place when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    dense = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda part: save_file(dense, part, metadata))


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers network folder, from one file or from the shards that its index names."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no safetensors files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def load_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def to_dtype(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
