"""The demo model's own SentencePiece vocabulary, in UMT5's conventions (pad 0, eos 1, bos 2, unk 3).

    python tokenizer.py ../tokenizer        trains spiece.model on captions of training scenes
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import sentencepiece as spm

from scenes import draw_scene, training_caption

VOCAB_SIZE = 320
MAX_TOKENS = 31  # in training; at run time a caption may have 512
SEED = 11


class Tokenizer:
    def __init__(self, model: Path):
        self.pieces = spm.SentencePieceProcessor(model_file=str(model))

    def encode(self, text: str, length: int = MAX_TOKENS) -> list[int]:
        """Ids with </s>, padded with 0 to `length`."""
        ids = self.pieces.encode(" ".join(text.split()))[: length - 1] + [1]
        return ids + [0] * (length - len(ids))


def train(folder: Path, captions: int = 60_000) -> None:
    rng = random.Random(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as corpus:
        lines = [training_caption(draw_scene(rng), rng) for _ in range(captions)]
        corpus.writelines(line + "\n" for line in lines)
        # A seed piece must occur in two different words, so every common word gets company.
        common = [word for word, count in Counter(" ".join(lines).split()).items() if count > captions // 200]
        corpus.writelines(f"{word}, {word}; {word}: {word}!\n" for word in sorted(common))
        corpus.flush()
        spm.SentencePieceTrainer.train(
            input=corpus.name, model_prefix=str(folder / "spiece"), vocab_size=VOCAB_SIZE, model_type="unigram",
            normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
            character_coverage=1.0, add_dummy_prefix=True, num_threads=1, minloglevel=2)
    (folder / "spiece.vocab").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0, "legacy": False,
              "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
