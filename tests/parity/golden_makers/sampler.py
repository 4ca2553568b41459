"""Samplers, step by step from injected noise and injected network outputs.

UniPC and Euler: diffusers' UniPCMultistepScheduler and FlowMatchEulerDiscreteScheduler. rCM: the
few lines of TurboDiffusion's text-to-video inference, in f64 numpy.
"""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from .common import must_matter, normal

SHAPE = (1, 4, 2, 3, 2)  # nothing in a sampler looks at the shape
MOST_STEPS = 20


def unipc(shift, **changes):
    return UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=shift, **changes)


def euler(shift):
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


def run(scheduler, steps, latents, velocities):
    scheduler.set_timesteps(steps)
    x, trail = latents, [latents]
    for t, v in zip(scheduler.timesteps, velocities):
        x = scheduler.step(v, t, x, return_dict=False)[0]
        trail.append(x)
    return {"timesteps": scheduler.timesteps.float(), "sigmas": scheduler.sigmas.float(),
            "latents": torch.stack(trail)}


def rcm(steps, latents, velocities, noise, sigma_max=80.0):
    tau = np.array([np.arctan(sigma_max), 1.5, 1.4, 1.0][:steps] + [0.0])
    t = np.sin(tau) / (np.cos(tau) + np.sin(tau))
    x = latents.double().numpy() * t[0]
    trail = [x]
    for i in range(steps):
        v, e = velocities[i].double().numpy(), noise[i].double().numpy()
        x = (1 - t[i + 1]) * (x - t[i] * v) + t[i + 1] * e
        trail.append(x)
    # The network sees bf16(1000 * f32(t)).
    timesteps = (1000 * torch.from_numpy(t[:-1]).float()).bfloat16().float()
    return {"timesteps": timesteps, "sigmas": torch.from_numpy(t).float(),
            "latents": torch.from_numpy(np.stack(trail)).float()}


def make(goldens):
    scheduler = unipc(3.0)
    scheduler.save_pretrained(goldens.model("odd") / "scheduler")
    latents = normal(51, "latents", *SHAPE)

    def write(kind, steps, shift, outputs, source, **extra):
        inputs = {"latents": latents, "velocities": normal(51, "velocities", MOST_STEPS, *SHAPE)[:steps],
                  **extra}
        args = ["sampler", "--sampler", kind, "--steps", str(steps), "--shift", str(shift)]
        goldens.write(f"sampler_{kind}_{steps}_{shift:g}", args, inputs, outputs(inputs),
                      source=source)

    for steps, shift in ((1, 3.0), (2, 5.0), (3, 3.0), (10, 5.0), (20, 3.0), (20, 8.0)):
        write("unipc", steps, shift,
              lambda i: run(unipc(shift), steps, i["latents"], i["velocities"]),
              "diffusers UniPCMultistepScheduler")
        write("euler", steps, shift,
              lambda i: run(euler(shift), steps, i["latents"], i["velocities"]),
              "diffusers FlowMatchEulerDiscreteScheduler")
    for steps in (1, 2, 3, 4):
        noise = normal(51, "noise", 4, *SHAPE)[:steps]
        write("rcm", steps, 1.0,
              lambda i: rcm(steps, i["latents"], i["velocities"], i["noise"]),
              "formula in sampler.py, f64", noise=noise)

    velocities = normal(51, "velocities", MOST_STEPS, *SHAPE)[:10]
    golden = run(unipc(5.0), 10, latents, velocities)["latents"]
    for what, other in (("the corrector", unipc(5.0, disable_corrector=list(range(10)))),
                        ("second order", unipc(5.0, solver_order=1)),
                        ("the shift", unipc(3.0))):
        must_matter(what, run(other, 10, latents, velocities)["latents"], golden)
