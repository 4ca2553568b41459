"""What an adapter says about its attention: the JSON object under `slalom.attention` of its file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace

METADATA_KEY = "slalom.attention"
KINDS = ("sla", "salad")
SCOPES = ("marginal", "noncritical", "all")
FEATURE_MAPS = ("softmax", "elu", "relu")
MAPS = ("topk", "window")
GATES = ("token", "sample")
RASTER = (1, 1, 1)


@dataclass(frozen=True)
class AttentionOptions:
    """Defaults are SLA's (arXiv 2509.24006); `for_kind` gives SALAD's (arXiv 2601.16515)."""

    kind: str = "sla"
    topk: float = 0.05  # share of key blocks in the softmax; 0 (SLA alone): the linear branch alone
    negligible: float = 0.1  # share of key blocks that are dropped
    scope: str = "marginal"  # which key blocks SLA's linear branch sums over
    feature_map: str = "softmax"
    block_q: int = 64
    block_k: int = 64
    map: str = "topk"
    gate: str = "token"
    dropped_layers: tuple[int, ...] = ()  # without a linear branch
    tile: tuple[int, int, int] = RASTER  # tokens of a box (frames, rows, columns) stand together
    layer_topk: tuple[float, ...] = ()  # each layer's own topk, of which `topk` is the mean; (): the same for all

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("scope", SCOPES), ("feature_map", FEATURE_MAPS), ("map", MAPS),
                              ("gate", GATES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if not 0 <= self.topk <= 1 or not 0 <= self.negligible < 1:
            raise ValueError(f"topk {self.topk} or negligible {self.negligible} is out of range")
        if self.topk == 0 and self.kind != "sla":
            raise ValueError("topk 0, the linear branch alone, is an SLA without its softmax")
        if self.map == "window" and (self.kind != "salad" or self.tile != RASTER):
            raise ValueError("windows are SALAD's, and they bring a token order of their own")
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"tile {self.tile} is not three positive sizes")
        if self.layer_topk and (not all(0 < topk <= 1 for topk in self.layer_topk)
                                or abs(sum(self.layer_topk) / len(self.layer_topk) - self.topk) > 1e-9):
            raise ValueError(f"layer_topk {self.layer_topk} are no shares whose mean is {self.topk}")

    @classmethod
    def for_kind(cls, kind: str, **changes: object) -> AttentionOptions:
        salad = {"topk": 0.1, "negligible": 0.0} if kind == "salad" else {}
        if layers := changes.get("layer_topk"):
            salad["topk"] = sum(layers) / len(layers)
        return cls(**{"kind": kind, **salad, **changes})

    def of_layer(self, layer: int) -> AttentionOptions:
        if not self.layer_topk:
            return self
        return replace(self, topk=self.layer_topk[layer], layer_topk=())

    def critical(self, key_blocks: int) -> int:
        """Key blocks in the softmax of one query block."""
        return 0 if self.topk == 0 else critical_blocks(self.topk, key_blocks)

    def sparsity(self, key_blocks: int) -> float:
        return 1 - self.critical(key_blocks) / key_blocks

    def to_metadata(self) -> dict[str, str]:
        """For a safetensors header; slalomd knows these keys and no other."""
        values = asdict(self)
        if self.tile == RASTER:
            del values["tile"]
        if not self.layer_topk:
            del values["layer_topk"]
        return {METADATA_KEY: json.dumps(values)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None) -> AttentionOptions:
        if METADATA_KEY not in (metadata or {}):
            raise ValueError(f"no adapter: its metadata has no {METADATA_KEY}")
        values = json.loads(metadata[METADATA_KEY])
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"{METADATA_KEY} has unknown keys: {', '.join(sorted(unknown))}")
        for name in ("dropped_layers", "tile", "layer_topk"):
            if name in values:
                values[name] = tuple(values[name])
        return cls.for_kind(values.pop("kind"), **values)


def critical_blocks(topk: float, key_blocks: int) -> int:
    """max(1, floor(topk * key_blocks)), as kernels/attention.h has it."""
    return min(max(1, math.floor(topk * key_blocks)), key_blocks)


def negligible_blocks(negligible: float, key_blocks: int, critical: int) -> int:
    return min(math.floor(negligible * key_blocks), key_blocks - critical)
