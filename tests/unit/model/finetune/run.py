#!/usr/bin/env python3
"""Runs tests of slalom_finetune (files, or all) where PyTorch is; where it is not, says how many were skipped and why.

Exit code 77 (ctest's skip) without torch, safetensors or pytest; else pytest's.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SKIPPED = 77


def main() -> int:
    files = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("test_*.py"))
    missing = [name for name in ("torch", "safetensors", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        count = sum(line.startswith("def test_") for file in files for line in file.read_text().splitlines())
        print(f"SKIPPED: {count} tests of slalom_finetune in {len(files)} file(s), for {sys.executable} has no "
              f"{', no '.join(missing)} (pip install torch safetensors pytest)")
        return SKIPPED
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", "-rs",
                           *map(str, files)]).returncode


if __name__ == "__main__":
    sys.exit(main())
