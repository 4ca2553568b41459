"""Turns scenes into numbers for the ray caster: static parameters and one pose per frame.

World: x to the right, y up, z away from the camera; the floor is y = 0.  Motion runs over the whole
clip, so a clip of 33 frames and one of 49 frames show the same motion.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from scenes import COLORS, FLOOR_COLORS, SHAPES, SIZES, TEXTURES, Scene

# Height of the body's centre over the floor when it rests, in units of its size; and its first yaw.
REST_HEIGHT = {"ball": 1.0, "cube": 0.82, "cone": 0.9, "cylinder": 0.85, "ring": 1.0, "pyramid": 0.85, "diamond": 1.1}
FIRST_YAW = {"ball": 0.4, "cube": 0.55, "cone": 0.4, "cylinder": 0.4, "ring": 0.35, "pyramid": 0.5, "diamond": 0.45}
GLOSS = {"plain": 0.16, "checkered": 0.12, "tiled": 0.20, "wooden": 0.08, "striped": 0.0}
LIGHTS = {  # sky top, sky horizon, light direction, light colour, ambient
    "day": ((0.16, 0.38, 0.78), (0.74, 0.86, 0.96), (-0.55, 0.95, -0.60), (1.00, 0.96, 0.88), (0.42, 0.47, 0.55)),
    "sunset": ((0.22, 0.20, 0.48), (0.98, 0.56, 0.30), (-0.80, 0.62, -0.50), (1.05, 0.78, 0.55), (0.42, 0.36, 0.42)),
    "night": ((0.01, 0.02, 0.07), (0.07, 0.11, 0.25), (-0.50, 0.95, -0.60), (0.50, 0.56, 0.72), (0.20, 0.23, 0.33)),
}
STATIC = 44  # floats per clip: see `static_parameters`
POSE = 12  # floats per frame: position (3), rotation (9, row-major, body to world)


@dataclass
class Jitter:
    """The small differences between two clips of one scene."""

    yaw: float  # camera, radians
    height: float  # camera
    zoom: float
    size: float
    turn: float  # body's first yaw
    x: float
    z: float


def draw_jitter(rng: random.Random) -> Jitter:
    u = rng.uniform
    return Jitter(yaw=u(-0.10, 0.10), height=u(-0.15, 0.15), zoom=u(0.97, 1.03), size=u(0.95, 1.05),
                  turn=u(-0.15, 0.15), x=u(-0.12, 0.12), z=u(-0.15, 0.15))


def _linear(rgb: tuple[float, float, float]) -> list[float]:
    return [c ** 2.2 for c in rgb]


def _normalized(v: list[float]) -> list[float]:
    n = math.sqrt(sum(c * c for c in v))
    return [c / n for c in v]


def _cross(a: list[float], b: list[float]) -> list[float]:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


def static_parameters(scene: Scene, jitter: Jitter) -> list[float]:
    """STATIC floats: shape, size, two body colours, floor, gloss, sky, light, ambient, camera."""
    base = _linear(COLORS[scene.color])
    lighter = 0.22 if scene.color != "white" else -0.35
    tint = [c + (1.0 - c) * lighter if lighter > 0 else c * (1 + lighter) for c in base]
    if scene.color == "black":
        tint = [c + 0.08 for c in base]
    floor = _linear(FLOOR_COLORS[scene.floor])
    second = {"plain": [0.86 * c for c in floor],
              "checkered": [0.72 + 0.14 * c for c in floor] if scene.floor != "white" else [0.30, 0.30, 0.31],
              "tiled": [0.30 * c for c in floor] if scene.floor == "white" else [0.55 + 0.3 * c for c in floor],
              "wooden": [0.55 * c for c in floor],
              "striped": [0.45 * c for c in floor]}[scene.texture]
    top, horizon, direction, light, ambient = LIGHTS[scene.sky]
    distance, target = 6.4, [0.0, 0.90, 0.0]
    camera = [distance * math.sin(jitter.yaw), 2.5 + jitter.height, -distance * math.cos(jitter.yaw)]
    forward = _normalized([t - c for t, c in zip(target, camera)])
    right = _normalized(_cross([0.0, 1.0, 0.0], forward))
    up = _cross(forward, right)
    tan_fov = math.tan(math.radians(20.5)) / jitter.zoom
    values = [float(SHAPES.index(scene.shape)), SIZES[scene.size] * jitter.size, *base, *tint,
              float(TEXTURES.index(scene.texture)), *floor, *second, GLOSS[scene.texture],
              *_linear(top), *_linear(horizon), *_normalized(list(direction)), *[1.55 * c for c in light],
              *[0.60 * c for c in ambient], *camera, *right, *up, *forward, tan_fov]
    assert len(values) == STATIC
    return values


def _fall_height(u: float) -> float:
    """1 at the start, 0 on the floor, with one small bounce."""
    if u < 0.62:
        return 1.0 - (u / 0.62) ** 2
    v = (u - 0.62) / 0.30
    return 0.12 * 4 * v * (1 - v) if v < 1 else 0.0


def _place(scene: Scene, jitter: Jitter, u: float) -> tuple[list[float], float]:
    """(position, yaw beyond the first) of the body at clip time u in [0, 1]."""
    size = SIZES[scene.size] * jitter.size
    rest = REST_HEIGHT[scene.shape] * size
    x, y, z, yaw = jitter.x, rest, jitter.z, 0.0
    reach = 2.2 - 0.85 * size
    sway = reach * (2 * u - 1)
    hop = abs(math.sin(3 * math.pi * u))
    if scene.motion in ("right", "hop_right"):
        x = sway
    elif scene.motion in ("left", "hop_left"):
        x = -sway
    elif scene.motion == "toward":
        z = 3.6 - 5.4 * u
    elif scene.motion == "away":
        z = -1.8 + 5.4 * u
    elif scene.motion == "circle":
        angle = -2 * math.pi * u - 0.5 * math.pi
        x, z = 1.25 * math.cos(angle), 0.3 + 1.25 * math.sin(angle)
    elif scene.motion == "spin":
        yaw = 2 * math.pi * u
    elif scene.motion == "bounce":
        y = rest + 1.15 * hop
    elif scene.motion == "rise":
        y = rest + 1.6 * u * u * (3 - 2 * u)
    elif scene.motion == "fall":
        y = rest + 1.8 * _fall_height(u)
    if scene.motion.startswith("hop"):
        y = rest + 0.85 * hop
    return [x, y, z], yaw


def _rotation(axis: list[float], angle: float) -> np.ndarray:
    """Rotation matrix [3, 3] about a unit axis (Rodrigues)."""
    x, y, z = axis
    k = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * (k @ k)


def poses(scene: Scene, jitter: Jitter, frames: int) -> np.ndarray:
    """[frames, POSE] float32: where the body is and how it is turned."""
    size = SIZES[scene.size] * jitter.size
    first = _rotation([0, 1, 0], FIRST_YAW[scene.shape] + jitter.turn)
    rolled = np.eye(3)
    out = np.empty((frames, POSE), np.float32)
    previous: list[float] | None = None
    for f in range(frames):
        place, yaw = _place(scene, jitter, f / (frames - 1) if frames > 1 else 0.5)  # a still: half-way
        if scene.rolls and previous is not None:
            step = [place[0] - previous[0], 0.0, place[2] - previous[2]]
            length = math.hypot(step[0], step[2])
            if length > 1e-9:
                rolled = _rotation(_cross([0, 1, 0], _normalized(step)), length / size) @ rolled
        previous = place
        out[f, :3] = place
        out[f, 3:] = (rolled @ _rotation([0, 1, 0], yaw) @ first if scene.rolls or yaw else first).ravel()
    return out


def pack(scenes: list[Scene], frames: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Static parameters [B, STATIC] and poses [B, frames, POSE], float32, with fresh jitter."""
    jitters = [draw_jitter(rng) for _ in scenes]
    static = np.array([static_parameters(s, j) for s, j in zip(scenes, jitters)], np.float32)
    return static, np.stack([poses(s, j, frames) for s, j in zip(scenes, jitters)])
