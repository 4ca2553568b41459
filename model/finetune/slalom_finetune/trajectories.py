"""Clips on their way through the sampler, for training on the states that a network meets when it draws clips.

A noised clip is never quite what the sampler hands to the network, and less so the further an adapter's own errors
have led it.  So some of a batch's clips walk from noise to a sample, one step of the sampler for each step of training:
half of them where the teacher leads, the others where the student leads, whose velocities training computes anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .data import Batch
from .sample import sigmas_of

STATE = ("x", "before", "place", "text", "mask")  # `before`: the velocity of the step before


class States(NamedTuple):
    """What one step trains on: noised clips, or clips on their way through the sampler."""

    x: Tensor
    sigma: Tensor
    target: Tensor  # noise - x0, of the diffusion loss
    text: Tensor
    mask: Tensor

    def twice(self, text: Tensor, mask: Tensor) -> States:
        """Also with the text of the empty prompt [1, n, text_dim]."""
        empty = (text.expand_as(self.text), mask.expand_as(self.mask))
        both = [torch.cat(pair) for pair in zip((self.text, self.mask), empty)]
        return States(*(torch.cat([t, t]) for t in (self.x, self.sigma, self.target)), *both)


class Trajectories:
    """`count` clips at places 0 .. steps - 1 of their way, captions with them; a clip that arrives makes room for another.

    The solver is Adams-Bashforth's of order 2, which needs no more than the velocity of the step before.
    """

    def __init__(self, steps: int, shift: float, state: dict[str, Tensor]):
        self.steps, self.sigmas = steps, torch.tensor(sigmas_of(steps, shift), device=state["x"].device)
        self.x, self.before, self.place, self.text, self.mask = (state[name] for name in STATE)

    @classmethod
    def on_noised_clips(cls, steps: int, shift: float, clips: Batch, noise: Tensor) -> Trajectories:
        """Spread over the whole way."""
        place = torch.arange(len(noise), device=noise.device) * steps // len(noise)
        found = cls(steps, shift, {"x": noise, "before": noise - clips.latents, "place": place, "text": clips.text,
                                   "mask": clips.mask})
        mix = found._at(place)
        found.x = (1 - mix) * clips.latents + mix * noise
        return found

    def _at(self, place: Tensor) -> Tensor:
        return self.sigmas[place].view(-1, 1, 1, 1, 1)

    def put_into(self, states: States) -> States:
        """In the place of as many of its first clips."""
        own = {"x": self.x, "sigma": self.sigmas[self.place], "text": self.text, "mask": self.mask}
        return states._replace(**{name: torch.cat([mine, getattr(states, name)[len(self.x):]]) for name, mine in own.items()})

    def advance(self, student: Tensor, teacher: Tensor, fresh: Batch, noise: Tensor) -> None:
        """One step by guided velocities [count, ...]; clips that have arrived begin again with `fresh`'s captions."""
        led_by_teacher = (torch.arange(len(noise), device=noise.device) % 2 == 0).view(-1, 1, 1, 1, 1)
        velocity = torch.where(led_by_teacher, teacher, student)
        step = self._at(self.place + 1) - self._at(self.place)
        last = self._at(self.place) - self._at((self.place - 1).clamp(min=0))  # 0 at the beginning
        half = torch.where(last == 0, 0.0, 0.5 * step / last.clamp(max=-1e-6))
        x = self.x + step * ((1 + half) * velocity - half * self.before)
        arrived = self.place + 1 == self.steps
        wide = arrived.view(step.shape)
        self.x, self.before = torch.where(wide, noise, x), velocity
        self.place = torch.where(arrived, 0, self.place + 1)
        self.text = torch.where(arrived.view(-1, 1, 1), fresh.text, self.text)
        self.mask = torch.where(arrived.view(-1, 1), fresh.mask, self.mask)

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in STATE}
