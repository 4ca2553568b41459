"""Cuts a file into pieces of at most 15 MiB and puts them together again, for transport.

    python pieces.py split FILE DIR        writes DIR/NAME.1-of-K ...
    python pieces.py join DIR NAME OUT     the way back; prints the SHA-256 of OUT, as split does
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

PIECE = 15 * 2**20


def split(file: Path, folder: Path) -> str:
    data = file.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{file.name}.*-of-*"):
        old.unlink()
    count = max(1, -(-len(data) // PIECE))
    for i in range(count):
        (folder / f"{file.name}.{i + 1}-of-{count}").write_bytes(data[i * PIECE:(i + 1) * PIECE])
    return hashlib.sha256(data).hexdigest()


def join(folder: Path, name: str, out: Path) -> str:
    """Raises FileNotFoundError when a piece is missing."""
    first = next(folder.glob(f"{name}.1-of-*"), None)
    if first is None:
        raise FileNotFoundError(f"no {name}.1-of-* in {folder}")
    count = int(first.name.rpartition("-of-")[2])
    data = b"".join((folder / f"{name}.{i + 1}-of-{count}").read_bytes() for i in range(count))
    out.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["split", file, folder]:
            print(split(Path(file), Path(folder)))
        case ["join", folder, name, out]:
            print(join(Path(folder), name, Path(out)))
        case _:
            sys.exit(__doc__)
