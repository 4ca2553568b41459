"""The demo model's little world: what is held out, and twins, whose captions tell them apart by word order alone."""

from __future__ import annotations

import random
import sys
import unittest
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model" / "demo" / "recipe"))
from scenes import MIRRORED, Scene, caption, draw_scene, is_held_out, twin  # noqa: E402


def words(scene: Scene, seed: int) -> Counter[str]:
    """A caption's words; articles depend on what follows them."""
    return Counter(word for word in caption(scene, random.Random(seed)).split() if word not in ("a", "an"))


class ScenesTest(unittest.TestCase):
    def test_one_combination_in_eight_is_held_out(self) -> None:
        rng = random.Random(1)
        colors, floors = ("red", "green", "blue", "white"), ("gray", "brown", "red")
        scenes = [Scene(c, s, m, "medium", f, "plain", "day", False) for c in colors for s in ("cube", "cone", "ball")
                  for m in ("left", "spin", "rise", "hop_left") for f in floors]
        self.assertAlmostEqual(sum(map(is_held_out, scenes)) / len(scenes), 1 / 8, delta=0.06)
        self.assertTrue(all(is_held_out(draw_scene(rng, held_out=True)) for _ in range(50)))
        self.assertFalse(any(is_held_out(draw_scene(rng)) for _ in range(50)))

    def test_a_twin_has_the_same_words_in_another_order(self) -> None:
        rng, same, mirrored, swapped = random.Random(2), 0, 0, 0
        for seed in range(500):
            scene = draw_scene(rng)
            other = twin(scene, rng)
            self.assertFalse(is_held_out(other))
            changed = {name for name, value in asdict(scene).items() if asdict(other)[name] != value}
            swaps = (other.color, other.floor) == (scene.floor, scene.color) and "color" in changed
            turns = other.motion == MIRRORED.get(scene.motion)
            if changed <= {"color", "floor", "motion"} and (swaps or turns):
                swapped, mirrored = swapped + swaps, mirrored + turns
                if {scene.motion, other.motion} & {"toward", "away"}:
                    continue  # the one direction with words of its own
                first, second = words(scene, seed), words(other, seed)
                if "left" in first and "right" not in first or "right" in first and "left" not in first:
                    continue  # "to the left"
                if "brown" in (scene.floor, other.floor):
                    continue  # "a wooden floor" is brown without saying so
                self.assertEqual(first, second)
                self.assertNotEqual(caption(scene, random.Random(seed)), caption(other, random.Random(seed)))
                same += 1
        self.assertGreater(min(same, swapped, mirrored), 50)

    def test_a_scene_without_a_twin_gets_another_scene(self) -> None:
        lonely = Scene("cyan", "cube", "spin", "medium", "gray", "plain", "day", False)
        others = {twin(lonely, random.Random(seed)) for seed in range(20)}
        self.assertGreater(len(others), 10)


if __name__ == "__main__":
    unittest.main()
