"""Runs a recipe's scripts phase by phase, within a call's time, on one GPU or on several side by side.

What is done stays done: a call that runs out of time is made again with the same work folder, and goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
FINETUNE = HERE.parents[1] / "finetune"
UNFINISHED = 3  # exit status of a script that ended before its work was done (training.py)
TRIES = 3  # of a phase, in one call that has time for them
PACKING = 6.0  # seconds kept for what comes after the phases


def script(name: str, *arguments: object) -> list[str]:
    """A script of this folder."""
    return [sys.executable, str(HERE / name), *map(str, arguments)]


@dataclass
class Phase:
    """One script's run.  It gets --deadline-seconds and answers with 0 or, to go on in the next call, UNFINISHED."""

    name: str
    command: list[str]
    least: float = 30.0  # seconds without which it is better left to the next call
    after: tuple[str, ...] = ()  # phases that must be done before
    gpu: int = 0  # modulo the GPUs there are
    beside: bool = False  # with several GPUs: does not wait for what runs on its GPU
    tail: float = 0.0  # seconds it leaves to those after it
    needs: tuple[Path, ...] = ()  # files that must be there before
    lane: str = ""  # phases of one lane run one after the other, in their order
    outputs: list[Path] = field(default_factory=list)  # copied to --out after each call, if they exist
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class _Child:
    process: subprocess.Popen
    log: BinaryIO  # read as the process writes it
    begin: float
    line: bytes = b""

    def show(self, name: str) -> None:
        """Prints the whole lines that came since the last time."""
        *lines, self.line = (self.line + self.log.read()).split(b"\n")
        for line in lines:
            print(f"{name}: {line.decode(errors='replace')}", flush=True)


class Call:
    """One call of a recipe: its clock, and SIGTERM, which ends it early but in order."""

    def __init__(self, work: Path, minutes: float, gpus: list[str]):
        self.work, self.gpus, self.end = work, gpus, time.time() + 60 * minutes - PACKING
        self.table: list[str] = []  # what became of each phase
        self.children: dict[str, _Child] = {}
        self.tries: dict[str, int] = {}
        (work / "log").mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *unused: object) -> None:
        self.end = 0.0

    def left(self) -> float:
        return self.end - time.time()

    def is_done(self, name: str) -> bool:
        return (self.work / "log" / f"{name}.done").exists()

    def _gpu(self, phase: Phase) -> int:
        return phase.gpu % max(len(self.gpus), 1)

    def _may_start(self, phase: Phase, running: list[Phase]) -> bool:
        beside = phase.beside and len(self.gpus) > 1
        free = beside or all(self._gpu(other) != self._gpu(phase) or (other.beside and len(self.gpus) > 1)
                             for other in running)
        free = free and not (phase.lane and any(other.lane == phase.lane for other in running))
        return free and all(self.is_done(name) for name in phase.after) and all(file.exists() for file in phase.needs)

    def _may_come(self, phase: Phase) -> bool:
        """Nothing but files are missing, and there is time to wait for them."""
        return (bool(phase.needs) and all(self.is_done(name) for name in phase.after)
                and self.left() >= phase.least + phase.tail)

    def _start(self, phase: Phase) -> None:
        caches = {name: str(self.work / "cache" / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        paths = os.pathsep.join(filter(None, (str(FINETUNE), os.environ.get("PYTHONPATH"))))
        # Threads of PyTorch on the CPU: with all cores for each of ten scripts they only wait for each other.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (4 * max(len(self.gpus), 1))))}
        environment = {**caches, **threads, **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, **phase.environment}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[self._gpu(phase)]
        log = self.work / "log" / f"{phase.name}.log"
        with log.open("ab") as out:
            shown = log.open("rb")
            shown.seek(0, os.SEEK_END)
            process = subprocess.Popen([*phase.command, "--deadline-seconds", f"{self.left() - phase.tail:.1f}"], stdout=out,
                                       stderr=subprocess.STDOUT, env=environment, process_group=0)
        self.children[phase.name] = _Child(process, shown, time.time())

    def _ended(self, phase: Phase) -> int:
        """Notes how a child ended; its status."""
        child = self.children.pop(phase.name)
        child.show(phase.name)
        child.log.close()
        status = child.process.returncode
        if status < 0 and self.left() < 0:
            status = UNFINISHED  # it was stopped before it could listen
        if status == 0:
            (self.work / "log" / f"{phase.name}.done").touch()
        self.table.append(f"{phase.name:20s} {time.time() - child.begin:5.0f} s  " + {
            0: "done", UNFINISHED: "goes on in the next call"}.get(status, f"failed: status {status}"))
        return status

    def _again(self, phase: Phase) -> bool:
        """Whether a phase that is not done gets another try in this call."""
        self.tries[phase.name] = self.tries.get(phase.name, 1) + 1
        return len(self.gpus) > 1 and self.tries[phase.name] <= TRIES and self.left() >= phase.least + phase.tail

    def _stop_late_ones(self) -> None:
        if self.left() < 0:
            for child in self.children.values():
                child.process.terminate()
        if self.left() < -PACKING / 2:
            for child in self.children.values():
                if child.process.poll() is None:
                    os.killpg(child.process.pid, signal.SIGKILL)

    def run(self, phases: list[Phase], between: Callable[[], None] = lambda: None, every: float = 45.0) -> int:
        """0: all done; UNFINISHED: another call is needed; else the status of a phase that failed.

        A phase that is not done stops those after it, and on a single GPU all that come later.  `between` is called
        every so many seconds on the way.
        """
        try:
            return self._run(phases, between, every)
        finally:
            for child in self.children.values():  # none, but after an error
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)

    def _run(self, phases: list[Phase], between: Callable[[], None], every: float) -> int:
        called = time.time()
        known = {phase.name: phase for phase in phases}
        self.table += [f"{phase.name:20s} done before" for phase in phases if self.is_done(phase.name)]
        waiting = [phase for phase in phases if not self.is_done(phase.name)]
        worst = 0
        while waiting or self.children:
            for phase in list(waiting):
                if (worst and len(self.gpus) < 2) or not self._may_start(phase, [known[name] for name in self.children]):
                    continue
                waiting.remove(phase)
                if self.left() >= phase.least + phase.tail:
                    self._start(phase)
                else:
                    self.table.append(f"{phase.name:20s} left to the next call: needs {phase.least + phase.tail:.0f} s of "
                                      f"{self.left():.0f} left")
                    worst = worst or UNFINISHED
            if not self.children and not any(map(self._may_come, waiting)):
                break
            time.sleep(0.25)
            if time.time() - called > every:
                between()
                called = time.time()
            self._stop_late_ones()
            for name in list(self.children):
                self.children[name].show(name)
                if self.children[name].process.poll() is not None:
                    status = self._ended(known[name])
                    if status and self._again(known[name]):
                        waiting.insert(0, known[name])
                        continue
                    worst = status if worst in (0, UNFINISHED) and status else worst
        return worst or (UNFINISHED if waiting else 0)

    def report(self, phases: list[Phase]) -> str:
        """The table, then every log."""
        logs = [f"== {phase.name}\n{log.read_text(errors='replace')}" for phase in phases
                if (log := self.work / "log" / f"{phase.name}.log").exists()]
        return "\n".join(self.table + logs)


def add_call_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, help="folder kept from call to call")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of this call, everything included")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="N", help="phases run side by side on these GPUs "
                        "(as CUDA_VISIBLE_DEVICES names them); else one after the other")
    parser.add_argument("--workers", type=int, default=4, help="processes that draw scenes, for each script that renders")
    parser.add_argument("--tiny", action="store_true", help="everything very small and short: a smoke run")
