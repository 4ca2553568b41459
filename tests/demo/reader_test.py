#!/usr/bin/env python3
"""The reader and check_clips.py on rendered clips whose content is known, and on spoilt ones.

Needs numpy and ffmpeg; without them it fails.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

from captions import clips_to_make
from reader import FRAMES, LABELS, SIDE, Reader, clip_of, load_clip

HERE = Path(__file__).resolve().parent
TRUE = HERE / "clips"
FACTS = {facts["file"]: facts for facts in json.loads((TRUE / "clips.json").read_text())}
BALL, CUBE, CONE = "red-ball-right.mp4", "blue-cube-bounce.mp4", "yellow-cone-fall.mp4"


def check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "check_clips.py"), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True)


class ReaderTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.reader = Reader()
        cls.clips = {file: load_clip(TRUE / file) for file in FACTS}

    def read(self, clip: np.ndarray) -> dict[str, str]:
        return self.reader.read(clip)

    def test_reads_what_the_clips_show(self) -> None:
        self.assertEqual(set(FACTS), {BALL, CUBE, CONE})
        for file, clip in self.clips.items():
            self.assertEqual(self.read(clip), {name: FACTS[file][name] for name in LABELS}, file)

    def test_other_colors_are_read_as_such(self) -> None:
        for file, clip in self.clips.items():
            rotated = self.read(clip[:, [2, 0, 1]])  # red turns green, green blue, blue red
            self.assertNotEqual(rotated["color"], FACTS[file]["color"], file)
        self.assertEqual(self.read(self.clips[BALL][:, [2, 0, 1]])["color"], "green")
        self.assertEqual(self.read(self.clips[CUBE][:, [2, 0, 1]])["color"], "red")

    def test_time_and_mirror_turn_the_direction(self) -> None:
        ball = self.clips[BALL]
        for turned in (ball[::-1], ball[:, :, :, ::-1]):
            found = self.read(turned)
            self.assertEqual((found["color"], found["motion"]), ("red", "left"))
        self.assertEqual(self.read(ball[::-1, :, :, ::-1])["motion"], "right")
        self.assertNotEqual(self.read(self.clips[CONE][::-1])["motion"], "fall")

    def test_a_still_is_no_motion_that_was_asked_for(self) -> None:
        for file, clip in self.clips.items():
            self.assertNotEqual(self.read(np.repeat(clip[:1], FRAMES, 0))["motion"], FACTS[file]["motion"], file)

    def test_an_empty_picture_has_no_say(self) -> None:
        """A clip without any body must not pass as one particular clip by chance of the network's biases."""
        for shade in (0.0, 0.5, 1.0):
            empty = self.read(np.full((FRAMES, 3, SIDE, SIDE), shade, np.float32))
            for file, facts in FACTS.items():
                self.assertNotEqual(empty, {name: facts[name] for name in LABELS}, file)


class ScalingTest(unittest.TestCase):
    def test_scaling_is_an_area_average(self) -> None:
        frames = np.random.default_rng(1).integers(0, 256, (FRAMES, 2 * SIDE, 3 * SIDE, 3), np.uint8)
        wanted = frames.reshape(FRAMES, SIDE, 2, SIDE, 3, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255
        np.testing.assert_allclose(clip_of(frames), wanted, atol=1e-5)

    def test_odd_sizes_keep_the_mean(self) -> None:
        frames = np.random.default_rng(2).integers(0, 256, (5, 65, 71, 3), np.uint8)
        picked = frames[np.linspace(0, 4, FRAMES).round().astype(int)]
        np.testing.assert_allclose(clip_of(frames).mean((2, 3)), picked.mean((1, 2)) / 255, atol=1e-4)


class CheckTest(unittest.TestCase):
    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def spoilt(self, file: str, filters: str) -> None:
        """clips.json says what it always said, but the video is another one."""
        command = ["ffmpeg", "-v", "error", "-i", str(TRUE / file), "-vf", filters, "-crf", "18", str(self.folder / file)]
        subprocess.run(command, check=True)
        (self.folder / "clips.json").write_text(json.dumps([FACTS[file]]))

    def test_right_clips_pass(self) -> None:
        done = check(TRUE, "--least", "1", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual((report["clips"], report["all"], report["wrong"]), (3, 1.0, []))

    def test_a_reversed_clip_fails_by_its_motion_alone(self) -> None:
        self.spoilt(BALL, "reverse")
        done = check(self.folder, "--least", "0.9", "--json")
        self.assertEqual(done.returncode, 1, done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual(report["right"], {"color": 1.0, "shape": 1.0, "motion": 0.0})
        self.assertEqual(report["wrong"][0]["read"], {"motion": "left"})

    def test_another_hue_fails(self) -> None:
        self.spoilt(CUBE, "hue=h=120")
        done = check(self.folder, "--least", "0.9", "--json")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertEqual(json.loads(done.stdout)["right"]["color"], 0.0)

    def test_no_clips_and_no_video_fail(self) -> None:
        (self.folder / "clips.json").write_text("[]")
        self.assertEqual(check(self.folder).returncode, 1)
        (self.folder / "clips.json").write_text(json.dumps([FACTS[BALL]]))
        self.assertNotEqual(check(self.folder).returncode, 0)


class CaptionsTest(unittest.TestCase):
    def test_captions_say_what_is_checked(self) -> None:
        clips = clips_to_make(100, 1, held_out=True)
        self.assertEqual(clips, clips_to_make(100, 1, held_out=True))
        self.assertGreater(len({clip["caption"] for clip in clips}), 95)
        for clip in clips:
            self.assertIn(clip["color"], clip["caption"])
            for name, values in LABELS.items():
                self.assertIn(clip[name], values)

    def test_held_out_scenes_are_not_in_the_training_set(self) -> None:
        names = ("color", "shape", "motion", "floor")
        seed = random.Random(7).randrange(1000)
        unseen = {tuple(clip[n] for n in names) for clip in clips_to_make(300, seed, held_out=True)}
        seen = {tuple(clip[n] for n in names) for clip in clips_to_make(3000, seed, held_out=False)}
        self.assertFalse(unseen & seen)


if __name__ == "__main__":
    unittest.main()
