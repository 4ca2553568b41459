"""Fine-tunes a dense transformer to SLA or SALAD attention, by flow matching or by matching its dense self.

x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0, t = 1000 sigma; sigma is a logit-normal draw, shifted as at
sampling time.  Every draw of a step follows from (seed, step), so a run that was killed goes on from its checkpoint
with the same bits: on a GPU as far as its kernels give the same bits twice (--deterministic).
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import add_lora, is_adapter_tensor, save_adapter, save_transformer, start_from
from .data import Batch, LatentSet
from .deadline import UNFINISHED, Deadline
from .files import write_atomically
from .library import describe
from .options import AttentionOptions
from .trajectories import States, Trajectories
from .wan import Tokens, WanTransformer

SAVING = 12.0  # seconds before its deadline at which a run by the clock ends
RETURNS = 5  # to the last checkpoint, each with half the rates, before a loss that is not finite ends a run
PACE_STEPS = 4  # steps that are timed, and not taken, to learn how many fit into --minutes


@dataclass(frozen=True)
class Plan:
    """Everything that the weights depend on.  A checkpoint belongs to one plan."""

    options: AttentionOptions
    train: str = "lora"  # "proj": the new parameters; "lora": these and LoRA on q, k, v, o; "all": every weight
    rank: int = 32
    lora_on: str = "self"  # or "all": also on cross-attention's q and o and on the MLP
    start: str = ""  # SHA-256 of the adapter that training starts from
    loss: str = "diffusion"  # or "teacher": the dense model's velocity
    block_loss: float = 0.0  # teacher: weight of the mean relative error of the blocks' outputs
    # teacher: weight of the error of the guided velocity; every clip then goes through with its caption and without
    guided_loss: float = 0.0
    guidance: float = 3.0
    trajectories: float = 0.0  # guided: share of a batch's clips that are on their way through the sampler
    sampler_steps: int = 20
    path_weights: bool = False  # teacher: errors count as much as the sampler's steps are long where they are made
    steps: int = 1000
    minutes: float = 0.0  # instead of steps: ends, and lets the rates fall, by the clock; the deadline shortens it
    batches: tuple[int, ...] = (16,)  # one per data file; files take turns
    turns: tuple[int, ...] = ()  # steps that each file gets in its turn; one each when left out
    rate: float = 1e-3
    base_rate: float = 1e-4  # of LoRA and base weights
    warmup: int = 50
    average: float = 0.999  # decay of the weights' moving average, which is what is written
    shift: float = 3.0
    noise_levels: str = "logit-normal"  # or "uniform", as the sampler has them; before the shift
    drop_text: float = 0.1
    seed: int = 1
    low_precision: bool = False  # autocast to bfloat16

    def batch_of(self, step: int) -> tuple[int, int]:
        """(data file, how many of its batches came before)."""
        order = [file for file, count in enumerate(self.turns or (1,) * len(self.batches)) for _ in range(count)]
        rounds, place = divmod(step, len(order))
        return order[place], rounds * order.count(order[place]) + order[:place].count(order[place])

    def rate_at(self, step: int, progress: float) -> float:
        """Factor on the rates: linear warm-up, then a cosine down to 2 %."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


@dataclass
class Places:
    """Where a run reads and writes; none of it changes the weights."""

    model: Path
    data: list[Path]
    work: Path  # checkpoint.pt, plan.json, log.jsonl
    out: Path  # attention/*.safetensors
    save_seconds: float = 60.0
    log_every: int = 20
    snapshots: tuple[float, ...] = ()  # out/at-SHARE/attention at these shares of the steps
    compile: bool = False
    recompute: bool = False
    start: Path | None = None  # an adapter's file
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Student(nn.Module):
    """The model in training, and the objective as one function that can be compiled."""

    def __init__(self, model: WanTransformer, plan: Plan):
        super().__init__()
        self.plan = plan
        teacher = copy.deepcopy(model) if plan.loss == "teacher" and plan.train == "all" else None
        model.adapt(plan.options)
        if plan.train == "lora":
            add_lora(model, plan.rank, plan.seed, plan.lora_on)
        self.model = model
        # Where the base weights stay, the model itself without its adapter is the teacher.
        self._teacher = [teacher or model]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(plan.train == "all" or is_adapter_tensor(name))
        for module in self._teacher if teacher else ():
            module.tile = plan.options.tile
            module.requires_grad_(False)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self, states: States, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the velocities of student and teacher (of the guided ones where the plan asks for them)."""
        plan = self.plan
        with torch.autocast(states.x.device.type, torch.bfloat16, enabled=plan.low_precision):
            args = (states.x, 1000 * states.sigma, states.text, states.mask, tokens)
            if plan.loss == "diffusion":
                got = self.model(*args).float()
                return F.mse_loss(got, states.target), got.detach(), states.target
            with torch.no_grad():
                wanted, wanted_blocks = self._teacher[0](*args, adapted=False, keep_blocks=True)
            got, got_blocks = self.model(*args, keep_blocks=True)
            total = self._error(got, wanted, states.sigma)
            if plan.block_loss:
                errors = [F.mse_loss(a, b) / b.square().mean() for a, b in zip(got_blocks, wanted_blocks)]
                total = total + plan.block_loss * torch.stack(errors).mean()
            if plan.guided_loss:
                got, wanted = (self._guided(v) for v in (got, wanted))
                total = total + plan.guided_loss * self._error(got, wanted, states.sigma[:len(got)])
            return total, got.detach(), wanted

    def _error(self, got: Tensor, wanted: Tensor, sigma: Tensor) -> Tensor:
        if not self.plan.path_weights:
            return F.mse_loss(got, wanted)
        shift = self.plan.shift
        length = (shift - (shift - 1) * sigma).square() / shift  # d sigma / d u where u falls evenly; 1 in the mean
        return ((got - wanted).square().mean((1, 2, 3, 4)) * length).mean()

    def _guided(self, velocity: Tensor) -> Tensor:
        """Of batches whose second half has no captions."""
        captioned, plain = velocity.chunk(2)
        return plain + self.plan.guidance * (captioned - plain)


def optimizer_of(student: Student) -> torch.optim.AdamW:
    """New parameters at the plan's rate, LoRA and base weights at its base rate; no decay."""
    new, base = [], []
    for name, parameter in student.trainable().items():
        (base if ".lora_" in name or not is_adapter_tensor(name) else new).append(parameter)
    groups = [{"params": group, "lr": rate, "peak": rate}
              for group, rate in ((new, student.plan.rate), (base, student.plan.base_rate)) if group]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


class Trainer:
    def __init__(self, plan: Plan, places: Places):
        self.plan, self.places, self.device = plan, places, places.device
        self.sets = [self._place(LatentSet.load(path)) for path in places.data]
        model = WanTransformer.load(places.model / "transformer").to(self.device)
        model.recompute = places.recompute
        self.student = Student(model, plan)
        if places.start:
            start_from(model, places.start)
        self.optimizer = optimizer_of(self.student)
        self.average = {name: p.detach().clone() for name, p in self.student.trainable().items()}
        self.tokens = [model.tokens(data.latents[:1].to(self.device)) for data in self.sets]
        self.objective = torch.compile(self.student.loss, dynamic=False) if places.compile else self.student.loss
        self.step, self.spent, self.begun, self.saved = 0, 0.0, 0.0, time.time()
        self.losses: list[Tensor] = []
        self.walks: dict[int, Trajectories] = {}  # by data file
        self.returns = 0  # to a checkpoint: the rates are halved as often
        self.limit = 60 * plan.minutes

    def _place(self, data: LatentSet) -> LatentSet:
        """On a GPU whole, when it is small."""
        return data.to(self.device) if data.latents.nbytes < 8 << 30 else data

    # --- one step ---

    def _placed(self, batch: Batch) -> Batch:
        latents, text, mask = (t.to(self.device, non_blocking=True) for t in (batch.latents, batch.text, batch.mask))
        return Batch(latents, text.float(), mask)

    def compute(self, step: int, walk: bool = False) -> Tensor:
        """The loss of one step, and its gradients.  `walk`: clips in the sampler go on."""
        plan, (which, before) = self.plan, self.plan.batch_of(step)
        data = self.sets[which]
        batch = self._placed(data.batch(before, plan.batches[which], plan.seed, 0.0 if plan.guided_loss else plan.drop_text))
        draws = torch.Generator(self.device).manual_seed(plan.seed * 1_000_003 + step)
        if plan.noise_levels == "uniform":
            u = torch.rand(len(batch.latents), generator=draws, device=self.device)
        else:
            u = torch.sigmoid(torch.randn(len(batch.latents), generator=draws, device=self.device))
        sigma = plan.shift * u / (1 + (plan.shift - 1) * u)
        noise = torch.randn(batch.latents.shape, generator=draws, device=self.device)
        mix = sigma.view(-1, 1, 1, 1, 1)
        states = States((1 - mix) * batch.latents + mix * noise, sigma, noise - batch.latents, batch.text, batch.mask)
        walking = round(plan.trajectories * len(sigma))
        ends = Batch(batch.latents[:walking], batch.text[:walking], batch.mask[:walking])
        if walking:
            if which not in self.walks:
                self.walks[which] = Trajectories.on_noised_clips(plan.sampler_steps, plan.shift, ends, noise[:walking])
            states = self.walks[which].put_into(states)
        if plan.guided_loss:
            empty = torch.tensor([len(data.begins) - 2])
            states = states.twice(*(t.to(self.device).float() for t in data.rows(empty)))
        loss, student, teacher = self.objective(states, self.tokens[which])
        loss.backward()
        if walking and walk:
            self.walks[which].advance(student[:walking], teacher[:walking], ends, noise[:walking])
        return loss.detach()

    def take_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.plan.rate_at(self.step, self.progress()) * 0.5 ** self.returns
        self.losses.append(self.compute(self.step, walk=True))
        trainable = self.student.trainable()
        nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.plan.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in trainable.values()], 1 - decay)

    def pace(self) -> float:
        """Seconds per step, measured on steps that change nothing."""
        steps = PACE_STEPS * max(sum(self.plan.turns), len(self.sets))
        for attempt in range(2):  # the first time compiles
            self._wait()
            begin = time.time()
            for step in range(steps):
                self.compute(step)
            self._wait()
        self.optimizer.zero_grad(set_to_none=True)
        self.walks.clear()
        return (time.time() - begin) / steps

    def _compile(self) -> None:
        """One step of each size that changes nothing: compilers take longer than the clock of a short training."""
        seen = {self.plan.batch_of(step)[0]: step for step in reversed(range(sum(self.plan.turns) or len(self.sets)))}
        for step in seen.values():
            self.compute(step)
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()

    def seconds(self) -> float:
        """Of training, in all calls."""
        return self.spent + (time.time() - self.begun if self.begun else 0.0)

    def progress(self) -> float:
        return self.seconds() / self.limit if self.plan.minutes else self.step / self.plan.steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # --- files ---

    def write_log(self) -> bool:
        """One line per step; a resumed run rewrites what came after its checkpoint.  False: a loss is not finite."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        first = self.step - len(values)
        with (self.places.work / "log.jsonl").open("a") as log:
            for i, value in enumerate(values):
                log.write(json.dumps({"step": first + i + 1, "loss": value}) + "\n")
        self.losses.clear()
        return all(math.isfinite(value) for value in values)

    def save(self) -> None:
        if not self.write_log() or not all(p.isfinite().all() for p in self.student.trainable().values()):
            self.turn_back()
            return
        state = {"step": self.step, "seconds": self.seconds(), "returns": self.returns, "plan": json.dumps(asdict(self.plan)),
                 "weights": {name: p.detach() for name, p in self.student.trainable().items()},
                 "average": self.average, "optimizer": self.optimizer.state_dict(),
                 "walks": {str(which): walk.state() for which, walk in self.walks.items()}}
        write_atomically(self.places.work / "checkpoint.pt", lambda part: torch.save(state, part))
        self.saved = time.time()

    def resume(self) -> None:
        path, log = self.places.work / "checkpoint.pt", self.places.work / "log.jsonl"
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            if json.loads(state["plan"]) != json.loads(json.dumps(asdict(self.plan))):
                raise ValueError(f"{path} belongs to another plan: {state['plan']}")
            trainable = self.student.trainable()
            with torch.no_grad():
                for name, value in state["weights"].items():
                    trainable[name].copy_(value)
                    self.average[name].copy_(state["average"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent, self.returns = state["step"], state["seconds"], state["returns"]
            for which, walk in state["walks"].items():
                self.walks[int(which)] = Trajectories(self.plan.sampler_steps, self.plan.shift, walk)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        kept = [line for line in lines[:self.step] if line.endswith("\n")]
        write_atomically(log, lambda part: part.write_text("".join(kept)) and None)

    def turn_back(self) -> None:
        """After a loss that is not finite: to the last checkpoint, on with half the rates.  The clock goes on, too."""
        if self.returns == RETURNS or not (self.places.work / "checkpoint.pt").exists():
            raise FloatingPointError(f"the loss is not finite before step {self.step}")
        seconds, returns = self.seconds(), self.returns + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.clear()
        self.walks.clear()
        self.resume()
        self.spent, self.begun, self.returns = seconds, time.time(), returns
        print(f"a loss is not finite: from step {self.step} on with the rates halved {returns} times", flush=True)

    def export(self, folder: Path | None = None) -> list[Path]:
        folder = folder or self.places.out
        state = self.student.model.state_dict() | self.average
        notes = {"slalom.finetune": json.dumps({**asdict(self.plan), "steps_done": self.step,
                                                "minutes": round(self.seconds() / 60, 2)})}
        written = [save_adapter(state, self.plan.options, folder, notes)]
        if self.plan.train == "all":
            written.append(save_transformer(state, self.places.model / "transformer", folder))
        return written

    def run(self, deadline: Deadline) -> int:
        self.places.work.mkdir(parents=True, exist_ok=True)
        self.resume()
        trained = sum(p.numel() for p in self.average.values())
        print(f"{self.plan.options.kind}: from step {self.step} of {self.plan.steps}, {trained / 1e6:.2f} M parameters, "
              f"{sum(len(s.latents) for s in self.sets)} clips, {describe(self.device)}", flush=True)
        if self.plan.minutes:
            self._compile()
            self.limit = min(self.limit, self.spent + max(deadline.left() - SAVING, 0.0))
        recent: list[float] = []
        snapshots = sorted(share for share in self.places.snapshots if share > self.progress())
        self.begun = time.time()
        while self.progress() < 1 and not deadline.over():
            self.take_step()
            while snapshots and self.progress() >= snapshots[0]:
                self.export(self.places.out / f"at-{snapshots.pop(0):g}")
            if self.step % self.places.log_every == 0:
                recent += torch.stack(self.losses).tolist()
                if not self.write_log():
                    self.turn_back()
                    recent.clear()
            if self.step % (10 * self.places.log_every) == 0:
                print(f"step {self.step} loss {sum(recent) / max(len(recent), 1):.5f} "
                      f"{self.seconds():.0f} s", flush=True)
                recent.clear()
            if time.time() - self.saved >= self.places.save_seconds:
                self._wait()
                self.save()
        self._wait()
        self.spent, self.begun = self.seconds(), 0.0
        self.save()
        print(f"{self.step} steps in {self.spent:.0f} s; wrote {', '.join(map(str, self.export()))}", flush=True)
        return 0 if self.progress() >= 1 else UNFINISHED
