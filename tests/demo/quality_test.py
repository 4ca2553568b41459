#!/usr/bin/env python3
"""The measures, the table and the curves of quality.py, on clips whose likeness is known.

Needs numpy and ffmpeg; without them it fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import unittest
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from chart import line_chart
from measures import consistency, load_frames, psnr, ssim
from quality import Variant, judge, judge_once, model_with, table

HERE = Path(__file__).resolve().parent
TRUE = HERE / "clips"
FACTS = json.loads((TRUE / "clips.json").read_text())


def noisy(clip: np.ndarray, sigma: float) -> np.ndarray:
    drawn = np.random.default_rng(1).normal(0, sigma, clip.shape)
    return np.clip(clip + drawn, 0, 255).astype(np.uint8)


class MeasuresTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.ball, cls.cube = (load_frames(TRUE / FACTS[i]["file"]) for i in (0, 1))

    def test_psnr_is_the_noise_s(self) -> None:
        flat = np.full((3, 64, 64, 3), 128, np.uint8)
        self.assertAlmostEqual(psnr(noisy(flat, 5), flat), 20 * np.log10(255 / 5), delta=0.2)
        self.assertEqual(psnr(self.ball, self.ball), 99)

    def test_ssim_falls_with_noise_and_knows_structure_from_brightness(self) -> None:
        self.assertAlmostEqual(ssim(self.ball, self.ball), 1, places=9)
        values = [ssim(noisy(self.ball, sigma), self.ball) for sigma in (2, 8, 32)]
        self.assertEqual(values, sorted(values, reverse=True))
        brighter = np.clip(self.ball.astype(int) + 6, 0, 255).astype(np.uint8)
        self.assertGreater(ssim(brighter, self.ball), values[1])
        self.assertLess(ssim(self.cube[:len(self.ball)], self.ball), 0.9)

    def test_consistency_sees_a_subject_that_changes_and_a_background_that_flickers(self) -> None:
        subject, background = consistency(self.ball)
        self.assertGreater(subject, 0.9)
        self.assertGreater(background, 0.97)
        changed = self.ball.copy()
        changed[1::2] = changed[1::2][..., ::-1]  # red and blue swap, in the body as in the floor
        self.assertLess(consistency(changed)[0], subject - 0.05)
        flicker = self.ball.astype(int)
        flicker[1::2] += 20
        self.assertLess(consistency(np.clip(flicker, 0, 255).astype(np.uint8))[1], background - 0.02)
        self.assertEqual(consistency(self.ball[:1]), (1.0, 1.0))


class TableTest(unittest.TestCase):
    def test_true_clips_are_judged_right_and_swapped_ones_are_not(self) -> None:
        first = judge(TRUE, FACTS, None)
        self.assertEqual((first["clips"], first["all"]), (len(FACTS), 1.0))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = [facts["file"] for facts in FACTS]
            for here, there in zip(files, files[1:] + files[:1]):
                shutil.copy(TRUE / here, folder / there)
            swapped = judge(folder, FACTS, TRUE)
            np.save((folder / files[0]).with_suffix(".npy"), load_frames(folder / files[0]))
            (folder / files[0]).unlink()
            self.assertEqual(judge(folder, FACTS, TRUE), swapped)  # frames as they are do as well
            self.assertLess(swapped["all"], 0.5)
            self.assertLess(swapped["psnr"], 30)
            notes = {"statistics": {"sparsity": 0.9722, "total_seconds": 3.5, "queue_seconds": 1.0}}
            (folder / files[0]).with_suffix(".json").write_text(json.dumps(notes))
            noted = judge(folder, FACTS[:1], None)
            self.assertAlmostEqual(noted["seconds"], 2.5)
            text = table({"dense": first, "swapped": noted})
            self.assertIn("| dense | 3 |  | 100.0 % |", text)
            self.assertIn("| swapped | 1 | 97.2 % |", text)

    def test_what_was_judged_is_kept_until_a_clip_is_newer(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "clips"
            shutil.copytree(TRUE, folder)
            first = judge_once(folder, FACTS, None)
            (kept,) = folder.glob(".judged-*")
            kept.write_text(json.dumps({**first, "kept": 1}))
            self.assertEqual(judge_once(folder, FACTS, None), {**first, "kept": 1})
            self.assertEqual(judge_once(folder, FACTS[:1], None)["clips"], 1)  # another question
            (folder / FACTS[0]["file"]).write_bytes((folder / FACTS[1]["file"]).read_bytes())
            self.assertLess(judge_once(folder, FACTS, None)["all"], 1.0)

    def test_variants(self) -> None:
        self.assertEqual(Variant.parse("sla-25=sla:0.25@out/step-3"), Variant("sla-25", "sla", "0.25", "out/step-3"))
        self.assertEqual(Variant.parse("dense=dense"), Variant("dense", "dense", None, None))
        with self.assertRaises(argparse.ArgumentTypeError):
            Variant.parse("x=linear")

    def test_other_adapters_stand_beside_the_same_networks(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            model, adapters = Path(name) / "model", Path(name) / "adapters"
            (model / "vae").mkdir(parents=True)
            (model / "attention").mkdir()
            (adapters / "attention").mkdir(parents=True)
            (adapters / "attention" / "sla.safetensors").write_text("trained")
            self.assertEqual(model_with(model, None, Path(name) / "a"), model)
            untrained = model_with(model, "none", Path(name) / "b")
            self.assertEqual([part.name for part in untrained.iterdir()], ["vae"])
            other = model_with(model, str(adapters), Path(name) / "c")
            self.assertEqual((other / "attention" / "sla.safetensors").read_text(), "trained")

    def test_a_chart_has_every_point(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "chart.svg"
            line_chart(file, "a < b", "x", "%", {"one": [(0, 1), (2, 3), (1, 2)], "two": [(0, 3), (2, 3)]})
            root = ElementTree.parse(file).getroot()
            self.assertEqual(len(root.findall(".//{http://www.w3.org/2000/svg}circle")), 5)
            self.assertIn("a < b", [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")])


if __name__ == "__main__":
    unittest.main()
