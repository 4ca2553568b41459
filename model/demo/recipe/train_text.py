"""Teaches the text encoder word order, before it meets any video: to tell from a caption what its scene is.

    python train_text.py --vocabulary ../tokenizer/spiece.model --out text.safetensors [--like model.safetensors]

Without this the encoder stays a bag of words: "a red ball on a green floor" and "a green ball on a red floor" have
the same words, and flow matching alone is too weak a teacher to find what order they stand in.  Small heads, thrown
away afterwards, read every attribute from one softly chosen row and from the mean of all rows.  With --like the rows
also stay near those of an encoder that some transformer knows already.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scenes import COLORS, FLOOR_COLORS, MOTIONS, SHAPES, SIZES, SKIES, TEXTURES, caption, draw_scene, training_caption, twin
from text_encoder import TextConfig, TextEncoder
from tokenizer import Tokenizer
from training import UNFINISHED, Deadline

FACTS = {"color": list(COLORS), "shape": SHAPES, "motion": MOTIONS, "floor": list(FLOOR_COLORS), "size": list(SIZES),
         "texture": TEXTURES, "sky": SKIES}
LIKE = 1.0  # weight of the relative difference from the rows of --like


class Heads(nn.Module):
    """Logits of every fact, from a softly chosen row and from the rows' mean."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(0.1 * torch.randn(len(FACTS), width))
        self.value = nn.Linear(width, width)
        self.chosen, self.mean = (nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in FACTS.items()})
                                  for _ in range(2))

    def forward(self, rows: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        scores = (rows @ self.query.T).masked_fill(mask[..., None] == 0, -1e9)
        chosen = scores.softmax(1).transpose(1, 2) @ self.value(rows)
        mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return ([head(chosen[:, i]) for i, head in enumerate(self.chosen.values())],
                [head(mean) for head in self.mean.values()])


def captions(tokenizer: Tokenizer, count: int, seed: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """ids [count, tokens] and facts [count, len(FACTS)], with twins in training; most captions say everything."""
    rng, ids, facts, scene = random.Random(seed), [], [], None
    for i in range(count):
        scene = twin(scene, rng) if scene and i % 2 and not held_out else draw_scene(rng, held_out)
        text = caption(scene, rng) if held_out or i % 8 < 6 else training_caption(scene, rng)
        ids.append(tokenizer.encode(text))
        facts.append([values.index(getattr(scene, name)) for name, values in FACTS.items()])
    return torch.tensor(ids), torch.tensor(facts)


def right(encoder: TextEncoder, heads: Heads, ids: Tensor, facts: Tensor) -> str:
    """How often the mean row tells each fact."""
    with torch.no_grad():
        mask = (ids > 0).float()
        guesses = heads(encoder(ids, mask), mask)[1]
    return "  ".join(f"{name} {100 * (guess.argmax(1) == facts[:, i]).float().mean():.1f} %"
                     for i, (name, guess) in enumerate(zip(FACTS, guesses)))


def train(args: argparse.Namespace, device: torch.device) -> int:
    deadline, tokenizer = Deadline(args.deadline_seconds, reserve=3), Tokenizer(args.vocabulary)
    torch.manual_seed(args.seed)
    (ids, facts), (new_ids, new_facts) = ((part.to(device) for part in captions(tokenizer, count, args.seed + held, held))
                                          for held, count in ((False, args.captions), (True, 2048)))
    encoder, heads = TextEncoder(TextConfig()).to(device), Heads(TextConfig().d_model).to(device)
    encoder.look_around()
    known = None
    if args.like:
        known = TextEncoder(TextConfig()).to(device).requires_grad_(False)
        known.load_state_dict({name: value.float() for name, value in load_file(args.like).items()})
    tables = [p for name, p in encoder.named_parameters() if "relative" in name]
    others = [p for name, p in encoder.named_parameters() if "relative" not in name]
    groups = [{"params": tables, "peak": 1e-2}, {"params": others, "peak": args.rate},
              {"params": heads.parameters(), "peak": 3 * args.rate}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)
    begin = time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / 30) * (1 - step / args.steps)
        pick = torch.randint(len(ids), (args.batch,), device=device)
        some, wanted = ids[pick], facts[pick]
        some = some[:, :int((some > 0).sum(1).max())]
        mask = (some > 0).float()
        rows = encoder(some, mask)
        loss = sum(F.cross_entropy(guess, wanted[:, i]) for guesses in heads(rows, mask) for i, guess in enumerate(guesses))
        apart = torch.zeros(())
        if known is not None:
            was = known(some, mask)
            apart = (rows - was).square().sum() / was.square().sum()
            loss = loss + LIKE * apart
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"text step {step + 1} {time.time() - begin:.0f} s loss {loss.item():.4f} apart {apart.item():.3f}: "
                  f"{right(encoder, heads, new_ids, new_facts)}", flush=True)
        if deadline.over():
            return UNFINISHED
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}, args.out)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--like", type=Path, help="a text encoder's weights")
    parser.add_argument("--captions", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--deadline-seconds", type=float, help="when this process ends, everything included")
    sys.exit(train(parser.parse_args(), torch.device("cuda" if torch.cuda.is_available() else "cpu")))
