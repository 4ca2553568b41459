"""Training: it learns, it is killed and goes on with the same bits, and what it writes is what was trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from slalom_finetune import AttentionOptions
from slalom_finetune.adapter import load_adapter
from slalom_finetune.data import Batch, LatentSet, SetBuilder
from slalom_finetune.deadline import UNFINISHED
from slalom_finetune.files import read_metadata, save_tensors
from slalom_finetune.sample import sigmas_of
from slalom_finetune.train import SAVING, Places, Plan, Student, Trainer
from slalom_finetune.trajectories import States, Trajectories
from slalom_finetune.wan import WanTransformer

DEMO = ROOT / "model" / "demo"
SMALL = ROOT / "tests" / "parity" / "goldens" / "head128"  # one head of 128, two blocks


def write_set(path: Path, text_dim: int, clips: int = 6, seed: int = 1) -> None:
    """Latents that are one smooth pattern in several strengths: something that can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    pattern, builder = torch.randn(16, 2, 8, 8, generator=generator), SetBuilder()
    for i in range(clips):
        texts = [torch.randn(2 + (i + j) % 3, text_dim, generator=generator) for j in range(1 + i % 2)]
        builder.add(pattern * (0.5 + i / clips), texts)
    builder.build(torch.zeros(1, text_dim)).save(path)


def train(tmp_path: Path, name: str, *options: str, background: bool = False):  # noqa: ANN201
    command = [sys.executable, "-m", "slalom_finetune", "train", "--model", str(SMALL), "--data",
               str(tmp_path / "a.safetensors"), "--work", str(tmp_path / name), "--out", str(tmp_path / name / "out"),
               "--block-q", "16", "--block-k", "16", "--batch", "2", "--device", "cpu", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "model" / "finetune"), "OMP_NUM_THREADS": "1"}
    if background:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def log_of(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [
    ("--attention", "sla", "--topk", "0.3", "--train", "lora", "--rank", "4"),
    ("--attention", "salad", "--topk", "0.3", "--loss", "teacher", "--block-loss", "0.5", "--rank", "2"),
    ("--attention", "sla", "--topk", "0.3", "--loss", "teacher", "--rank", "2", "--lora-on", "all", "--guided-loss", "0.1",
     "--trajectories", "0.5", "--sampler-steps", "6", "--noise-levels", "uniform", "--path-weights"),
], ids=["sla", "salad", "trajectories"])
def test_a_killed_run_goes_on_with_the_same_losses(tmp_path: Path, options: tuple[str, ...]) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    steps = ("--steps", "40", "--save-seconds", "0.02", "--warmup", "5", *options)
    whole = train(tmp_path, "whole", *steps)
    assert whole.returncode == 0, whole.stderr

    work = tmp_path / "killed"
    child = train(tmp_path, "killed", *steps, background=True)
    begin = time.time()
    while child.poll() is None and time.time() - begin < 120:
        if (work / "checkpoint.pt").exists() and len(log_of(work)) >= 8:
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert child.wait() == -signal.SIGKILL, "it was over before it could be killed"
    assert not list((work / "out").glob("attention/*"))
    stopped_at = torch.load(work / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < stopped_at < 40
    with (work / "log.jsonl").open("a") as log:
        log.write('{"step": 999, "loss"')  # as a kill in the middle of a line leaves it

    again = train(tmp_path, "killed", *steps)
    assert again.returncode == 0, again.stderr
    assert f"from step {stopped_at} of 40" in again.stdout
    assert log_of(work) == log_of(tmp_path / "whole") and len(log_of(work)) == 40
    name = f"{options[1]}.safetensors"
    ours, theirs = (load_file(tmp_path / run / "out" / "attention" / name) for run in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_it_ends_by_its_deadline_and_a_changed_plan_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    begin = time.time()
    run = train(tmp_path, "short", "--steps", "1000000", "--deadline-seconds", "9")
    assert run.returncode == UNFINISHED, run.stderr
    assert time.time() - begin < 60
    assert (tmp_path / "short" / "out" / "attention" / "sla.safetensors").exists()
    other = train(tmp_path, "short", "--steps", "1000000", "--rate", "0.5")
    assert other.returncode == 1 and "another plan" in other.stderr


def test_minutes_become_steps_once(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    run = train(tmp_path, "timed", "--minutes", "0.02", "--train", "proj")
    assert run.returncode == 0, run.stderr
    steps = json.loads((tmp_path / "timed" / "steps.json").read_text())
    assert steps == len(log_of(tmp_path / "timed")) >= 1
    again = train(tmp_path, "timed", "--minutes", "5", "--train", "proj")
    assert again.returncode == 0 and f"from step {steps} of {steps}" in again.stdout


def places(tmp_path: Path, model: Path = SMALL) -> Places:
    return Places(model, [tmp_path / "a.safetensors"], tmp_path / "work", tmp_path / "out")


class Never:
    def over(self) -> bool:
        return False

    def left(self) -> float:
        return float("inf")


class Soon(Never):
    def left(self) -> float:
        return SAVING + 1.0


@pytest.mark.parametrize("kind,train_what", [("sla", "proj"), ("sla", "lora"), ("sla", "all"), ("salad", "lora")])
def test_matching_the_teacher_brings_sparse_attention_nearer_to_dense(tmp_path: Path, kind: str,
                                                                      train_what: str) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    options = AttentionOptions.for_kind(kind, topk=0.1, negligible=0.0, block_q=16, block_k=16)
    plan = Plan(options, train_what, rank=8, loss="teacher", block_loss=1.0, steps=60, batches=(4,), rate=1e-2,
                base_rate=2e-3, warmup=5, average=0.9)
    trainer = Trainer(plan, places(tmp_path))
    base = {name: p.clone() for name, p in trainer.student.model.named_parameters() if not p.requires_grad}
    assert trainer.run(Never()) == 0
    losses = [line["loss"] for line in log_of(tmp_path / "work")]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert all(torch.equal(p, base[name]) for name, p in trainer.student.model.named_parameters() if name in base)

    written = tmp_path / "out" / "attention" / f"{kind}.safetensors"
    model = WanTransformer.load((tmp_path / "out" if train_what == "all" else SMALL) / "transformer")
    assert load_adapter(model, written) == options
    names = set(load_file(written))
    assert any(".lora_" in name for name in names) == (train_what == "lora")
    notes = json.loads(read_metadata(written)["slalom.finetune"])
    assert notes["steps_done"] == 60 and notes["options"]["kind"] == kind


def test_the_teacher_is_the_dense_model_even_when_all_weights_are_trained(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    options = AttentionOptions(topk=1.0, negligible=0.0, block_q=16, block_k=16, tile=(2, 2, 2))
    for train_what in ("proj", "all"):
        trainer = Trainer(Plan(options, train_what, loss="teacher", steps=2, batches=(2,), drop_text=0.0),
                          places(tmp_path))
        assert float(trainer.compute(0)) < 1e-9  # every block critical: the student is dense, too
        trainer.student.model.proj_out.weight.data.zero_()
        moved = float(trainer.compute(0))
        assert moved > 1e-3 if train_what == "all" else moved == 0


def test_training_goes_on_from_an_adapter_and_lora_reaches_every_layer(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    options = AttentionOptions(topk=0.3, block_q=16, block_k=16)
    first = Trainer(Plan(options, "lora", rank=2, steps=6, batches=(2,), base_rate=1e-2), places(tmp_path))
    assert first.run(Never()) == 0
    where = places(tmp_path)
    where.start, where.work = tmp_path / "out" / "attention" / "sla.safetensors", tmp_path / "more"
    wider = Plan(options, "lora", rank=2, lora_on="all", steps=4, batches=(2,), base_rate=1e-2)
    second, fresh = Trainer(wider, where), Trainer(wider, places(tmp_path))
    stored = load_file(where.start)
    assert {name for name in stored if ".lora_A." in name} < {name for name in second.average if ".lora_A." in name}
    for name, value in second.average.items():
        assert torch.equal(value, stored[name].float() if name in stored else fresh.average[name])
    assert second.run(Never()) == 0
    written = tmp_path / "out" / "attention" / "sla.safetensors"
    model = WanTransformer.load(SMALL / "transformer")
    assert load_adapter(model, written) == options
    trained = load_file(written)
    for block in ("blocks.0.", "blocks.1."):
        for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"):
            assert trained[f"{block}{name}.lora_B.weight"].abs().max() > 0
        assert f"{block}attn2.to_k.lora_A.weight" not in trained
    with pytest.raises(ValueError, match="does not fit this plan"):
        Trainer(Plan(options, "lora", rank=3, steps=4, batches=(2,)), where)


def test_layers_may_have_their_own_topk(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    options = AttentionOptions.for_kind("sla", layer_topk=(0.5, 0.25), block_q=16, block_k=16)
    assert options.topk == 0.375 and options.of_layer(1).topk == 0.25
    trainer = Trainer(Plan(options, "proj", steps=1, batches=(2,)), places(tmp_path))
    assert [block.attn1.sla.topk for block in trainer.student.model.blocks] == [0.5, 0.25]
    assert trainer.run(Never()) == 0
    model = WanTransformer.load(SMALL / "transformer")
    assert load_adapter(model, tmp_path / "out" / "attention" / "sla.safetensors") == options
    assert [block.attn1.sla.topk for block in model.blocks] == [0.5, 0.25]
    with pytest.raises(ValueError, match="3 values of layer_topk for 2 layers"):
        model.adapt(AttentionOptions.for_kind("sla", layer_topk=(0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match="mean"):
        AttentionOptions(topk=0.3, layer_topk=(0.5, 0.25))


def test_clips_walk_through_the_sampler(tmp_path: Path) -> None:
    """Led by the true velocity of straight paths, every clip arrives where its noise came from."""
    generator = torch.Generator().manual_seed(3)
    clips, noise, other = (torch.randn(4, 16, 2, 4, 4, generator=generator) for _ in range(3))
    batch = Batch(clips, torch.zeros(4, 3, 8), torch.ones(4, 3))
    walk = Trajectories.on_noised_clips(5, 3.0, batch, noise)
    assert walk.place.tolist() == [0, 1, 2, 3]
    seen = set()
    for _ in range(4):
        states = walk.put_into(States(other, torch.zeros(4), other, batch.text + 1, batch.mask))
        here = states.sigma.view(-1, 1, 1, 1, 1)
        straight = (1 - here) * clips + here * noise
        unfinished = walk.place >= torch.tensor([0, 1, 2, 3])  # those that have not begun again
        torch.testing.assert_close(states.x[unfinished], straight[unfinished], atol=1e-4, rtol=0)
        assert states.text.abs().max() == 0
        seen |= set(walk.place.tolist())
        walk.advance(noise - clips, noise - clips, Batch(clips, batch.text, batch.mask), other)
    assert seen == {0, 1, 2, 3, 4}
    assert walk.place.tolist() == [4, 0, 1, 2]
    torch.testing.assert_close(walk.put_into(states).x[1], other[1])  # a new way begins at the noise


def test_errors_count_as_the_sampler_s_steps_are_long(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    student = Trainer(Plan(AttentionOptions(topk=0.3, block_q=16, block_k=16), loss="teacher", path_weights=True, shift=3.0),
                      places(tmp_path)).student
    sigmas = torch.tensor(sigmas_of(4000, 3.0), dtype=torch.float64)
    wrong, right = torch.ones(4000, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(4000, 1, 1, 1, 1, dtype=torch.float64)
    assert float(student._error(wrong, right, sigmas[:-1])) == pytest.approx(1.0, abs=5e-3)
    steps = -sigmas.diff() * 4000
    for i in (0, 1000, 3990):
        assert float(student._error(wrong[:1], right[:1], sigmas[i:i + 1])) == pytest.approx(float(steps[i]), rel=0.02)


def test_a_run_by_the_clock_ends_by_it(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    plan = Plan(AttentionOptions(topk=0.3, block_q=16, block_k=16), "proj", minutes=0.05, batches=(2,))
    where = places(tmp_path)
    where.snapshots = (0.3,)
    trainer = Trainer(plan, where)
    assert trainer.run(Never()) == 0
    assert 3 <= trainer.seconds() < 30 and trainer.step > 2
    assert plan.rate_at(1000, 0.5) == pytest.approx(0.51, abs=0.02) and plan.rate_at(1000, 1.0) == pytest.approx(0.02)
    done = json.loads(read_metadata(tmp_path / "out" / "at-0.3" / "attention" / "sla.safetensors")["slalom.finetune"])
    assert done["steps_done"] < trainer.step
    where.work = tmp_path / "shorter"
    shorter = Trainer(replace(plan, minutes=10.0), where)  # its deadline comes before, so it is done by then
    assert shorter.run(Soon()) == 0 and shorter.seconds() < 30


def test_a_loss_that_is_not_finite_leads_back_to_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    plan = Plan(AttentionOptions(topk=0.3, block_q=16, block_k=16), batches=(2,), steps=20, warmup=1, rank=2)
    trainer, compute, seen = Trainer(plan, replace(places(tmp_path), log_every=1, save_seconds=0)), Trainer.compute, []

    def spoilt(self: Trainer, step: int, walk: bool = False) -> torch.Tensor:
        loss = compute(self, step, walk)
        seen.append((step, self.optimizer.param_groups[0]["lr"] / (plan.rate * plan.rate_at(step, step / plan.steps))))
        return loss * torch.nan if step == 7 and len(seen) == 8 else loss

    monkeypatch.setattr(Trainer, "compute", spoilt)
    assert trainer.run(Never()) == 0
    assert [step for step, _ in seen] == [*range(8), *range(7, 20)] and trainer.returns == 1
    assert [factor for _, factor in seen] == pytest.approx([1.0] * 8 + [0.5] * 13)
    assert [line["step"] for line in log_of(trainer.places.work)] == [*range(1, 21)]


def test_the_linear_branch_alone_can_be_trained(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    options = AttentionOptions(topk=0.0, scope="all", block_q=16, block_k=16)
    trainer = Trainer(Plan(options, "lora", rank=2, steps=3, batches=(2,)), places(tmp_path))
    assert trainer.run(Never()) == 0
    assert (tmp_path / "out" / "attention" / "linear.safetensors").exists()


def test_a_step_s_batch_follows_from_its_number(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16, clips=5)
    data = LatentSet.load(tmp_path / "a.safetensors")
    one, same = data.batch(3, 2, 1, 0.5), data.batch(3, 2, 1, 0.5)
    assert torch.equal(one.latents, same.latents) and torch.equal(one.text, same.text)
    strengths = [float(clip.square().mean()) for step in range(5) for clip in data.batch(step, 2, 1, 0.0).latents]
    assert len(set(strengths[:5])) == len(set(strengths[5:])) == 5  # every clip once per epoch
    assert one.text.shape == (2, data.longest, 16)
    nothing = data.batch(0, 4, 1, 1.0)
    assert nothing.text.abs().max() == 0 and nothing.mask.sum() == 4  # the empty prompt has one row


def test_two_sizes_take_turns(tmp_path: Path) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    write_set(tmp_path / "b.safetensors", 16, clips=3, seed=2)
    where = places(tmp_path)
    where.data.append(tmp_path / "b.safetensors")
    plan = Plan(AttentionOptions(topk=0.5, block_q=16, block_k=16), "proj", steps=4, batches=(2, 1), turns=(2, 1))
    assert [plan.batch_of(step) for step in range(5)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3)]
    trainer = Trainer(plan, where)
    assert trainer.run(Never()) == 0 and trainer.step == 4


@pytest.mark.parametrize("guided", [0.0, 0.1])
def test_the_objective_compiles(tmp_path: Path, guided: float) -> None:
    write_set(tmp_path / "a.safetensors", 16)
    plan = Plan(AttentionOptions(topk=0.3, block_q=16, block_k=16), "lora", rank=2, loss="teacher", block_loss=1.0,
                batches=(2,), drop_text=0.0, guided_loss=guided, trajectories=guided and 0.5)
    trainer = Trainer(plan, places(tmp_path))
    plain = float(trainer.compute(0))
    trainer.objective = torch.compile(trainer.student.loss, dynamic=False, backend="aot_eager", fullgraph=True)
    assert abs(float(trainer.compute(0)) - plain) < 1e-4 * plain


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    model = WanTransformer.load(SMALL / "transformer")
    student = Student(model, Plan(AttentionOptions(), "proj"))
    names = sorted(student.trainable())
    assert names == [f"blocks.{n}.attn1.sla.proj_l.{leaf}" for n in range(2) for leaf in ("bias", "weight")]
    path = tmp_path / "sla.safetensors"
    save_tensors({names[0]: torch.zeros(128)}, path, AttentionOptions().to_metadata())
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(WanTransformer.load(SMALL / "transformer"), path)
    save_tensors({names[0]: torch.zeros(128)}, path, {})
    with pytest.raises(ValueError, match="no adapter"):
        load_adapter(WanTransformer.load(SMALL / "transformer"), path)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == names[:1]
