"""Finds the package in the tree."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT / "model" / "finetune"))

torch.set_num_threads(2)
