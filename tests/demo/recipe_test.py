#!/usr/bin/env python3
"""The curves of make_adapters.py, drawn from what a call has left: nothing yet, a part, all."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model" / "demo" / "recipe"))

from make_adapters import SNAPSHOTS, TINY, adapter_file, draw_curves  # noqa: E402

ROW = {"all": 0.5, "subject": 0.9, "psnr": 20.0}


def adapter(file: Path, steps: int) -> None:
    """A safetensors file without tensors."""
    header = json.dumps({"__metadata__": {"slalom.finetune": json.dumps({"steps_done": steps})}}).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(header).to_bytes(8, "little") + header)


class CurvesTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.args = argparse.Namespace(work=Path(folder.name), out=Path(folder.name) / "out", steps_before=0)
        (self.args.work / "curves").mkdir()
        self.args.out.mkdir()

    def draw(self, **rows: dict) -> dict[str, str]:
        """The charts, by name."""
        named = {name.replace("_", "-"): row for name, row in rows.items()}
        (self.args.work / "curves" / "table.json").write_text(json.dumps(named))
        draw_curves(self.args, TINY.sets[0])
        return {file.stem: file.read_text() for file in self.args.out.glob("*.svg")}

    def test_the_dense_clips_alone_are_no_curve(self) -> None:
        self.assertEqual(self.draw(dense=ROW), {})

    def test_lines_without_points_are_left_out(self) -> None:
        charts = self.draw(dense={"all": 1.0, "subject": 0.9}, sparse=ROW)
        self.assertEqual(sorted(charts), ["accuracy-sparsity", "psnr-sparsity", "subject-sparsity"])
        self.assertIn(">untrained<", charts["accuracy-sparsity"])
        self.assertIn(">dense<", charts["accuracy-sparsity"])
        self.assertNotIn(">dense<", charts["psnr-sparsity"])
        self.assertNotIn(">SLA<", charts["accuracy-sparsity"])

    def test_a_kind_that_was_not_trained_has_no_steps(self) -> None:
        adapter(adapter_file(self.args, "sla", SNAPSHOTS[0]), 100)
        adapter(adapter_file(self.args, "sla"), 1000)
        charts = self.draw(dense=ROW, sparse=ROW, sparse_salad=ROW, sla=ROW)
        self.assertEqual(len(charts), 6)
        self.assertIn(">SLA<", charts["accuracy-steps"])
        self.assertIn(">1000<", charts["accuracy-steps"])
        self.assertNotIn(">SALAD<", charts["accuracy-steps"])


if __name__ == "__main__":
    unittest.main()
