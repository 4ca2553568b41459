"""A ray caster for the little world: one Triton kernel, one program per run of pixels of one frame.

Bodies are signed distance fields.  Each pixel takes 2x2 rays.  The floor gets the penumbra of an
area light (Quilez' distance-field estimate), contact darkening and, where it is glossy, a mirror
image of the body.  `motion.py` says what the parameters mean.

Without a GPU the kernel runs (slowly) in Triton's interpreter: set TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from motion import POSE, STATIC


@triton.jit
def _distance(shape, x, y, z):
    """Signed distance (a lower bound outside edges) of body-frame points, for a body of size 1."""
    ax, ay, az = tl.abs(x), tl.abs(y), tl.abs(z)
    if shape == 0:  # ball
        d = tl.sqrt(x * x + y * y + z * z) - 1.0
    elif shape == 1:  # cube with rounded edges
        qx, qy, qz = tl.maximum(ax - 0.74, 0.0), tl.maximum(ay - 0.74, 0.0), tl.maximum(az - 0.74, 0.0)
        inner = tl.minimum(tl.maximum(ax, tl.maximum(ay, az)) - 0.74, 0.0)
        d = tl.sqrt(qx * qx + qy * qy + qz * qz) + inner - 0.08
    elif shape == 2:  # cone: apex (0, 1.05, 0), base radius 0.8 at y = -0.9
        d = tl.maximum(0.925 * tl.sqrt(x * x + z * z) + 0.380 * (y - 1.05), -0.9 - y)
    elif shape == 3:  # cylinder
        qr, qy = tl.sqrt(x * x + z * z) - 0.66, ay - 0.79
        px, py = tl.maximum(qr, 0.0), tl.maximum(qy, 0.0)
        d = tl.sqrt(px * px + py * py) + tl.minimum(tl.maximum(qr, qy), 0.0) - 0.06
    elif shape == 4:  # ring, its hole along z
        q = tl.sqrt(x * x + y * y) - 0.72
        d = tl.sqrt(q * q + z * z) - 0.28
    elif shape == 5:  # pyramid: apex (0, 1.05, 0), square base of half side 0.85 at y = -0.85
        d = tl.maximum(0.913 * tl.maximum(ax, az) + 0.408 * (y - 1.05), -0.85 - y)
    else:  # diamond: an octahedron, a little tall
        d = 0.6155 * (ax + az) + 0.492 * ay - 0.541
    return d


@triton.jit
def _to_body(x, y, z, px, py, pz, r0, r1, r2, r3, r4, r5, r6, r7, r8):
    """World point minus (px, py, pz), turned by the transposed rotation."""
    x, y, z = x - px, y - py, z - pz
    return r0 * x + r3 * y + r6 * z, r1 * x + r4 * y + r7 * z, r2 * x + r5 * y + r8 * z


@triton.jit
def _near(ox, oy, oz, dx, dy, dz, px, py, pz, reach):
    """(hits, entry, exit) of rays against the sphere of radius `reach` about the body."""
    cx, cy, cz = px - ox, py - oy, pz - oz
    along = cx * dx + cy * dy + cz * dz
    away2 = cx * cx + cy * cy + cz * cz - along * along
    half = tl.sqrt(tl.maximum(reach * reach - away2, 0.0))
    return (away2 < reach * reach) & (along + half > 0.0), tl.maximum(along - half, 0.0), along + half


@triton.jit
def _march(shape, size, ox, oy, oz, dx, dy, dz, near, far, STEPS: tl.constexpr):
    """Sphere tracing in the body frame: (t, hit)."""
    t = near
    d = t * 0.0 + 1.0
    for _ in range(STEPS):
        d = size * _distance(shape, (ox + t * dx) / size, (oy + t * dy) / size, (oz + t * dz) / size)
        t = tl.minimum(t + tl.maximum(d, 0.0), far)
    return t, d < 0.004


@triton.jit
def _penumbra(shape, size, ox, oy, oz, dx, dy, dz, near, far, STEPS: tl.constexpr):
    """Share of the area light that a floor point sees, 0..1."""
    t = near
    light = t * 0.0 + 1.0
    for _ in range(STEPS):
        d = size * _distance(shape, (ox + t * dx) / size, (oy + t * dy) / size, (oz + t * dz) / size)
        light = tl.minimum(light, 0.5 + 0.5 * d / (0.16 * t + 0.02))
        t = tl.minimum(t + tl.maximum(tl.abs(d), 0.03), far)
    light = tl.maximum(light, 0.0)
    return light * light * (3.0 - 2.0 * light)


@triton.jit
def _normal(shape, x, y, z):
    """Unit body-frame normal at body-frame points (size 1), by central differences."""
    e = 0.004
    nx = _distance(shape, x + e, y, z) - _distance(shape, x - e, y, z)
    ny = _distance(shape, x, y + e, z) - _distance(shape, x, y - e, z)
    nz = _distance(shape, x, y, z + e) - _distance(shape, x, y, z - e)
    n = 1.0 / tl.sqrt(nx * nx + ny * ny + nz * nz + 1e-12)
    return nx * n, ny * n, nz * n


@triton.jit
def _second_color(shape, x, y, z):
    """True where a round body wears its second colour: the pattern shows how it turns."""
    mark = x * 0.0 - 1.0
    if shape == 0:
        mark = x * y * z
    elif (shape == 2) | (shape == 3):
        mark = x * z
    elif shape == 4:
        mark = x * y
    return mark > 0.0


@triton.jit
def _shade_body(shape, size, s, lx, ly, lz, dx, dy, dz, hx, hy, hz,
                r0, r1, r2, r3, r4, r5, r6, r7, r8):
    """Linear RGB of body hits: body-frame point (hx, hy, hz), world ray (dx, dy, dz), `s` static row."""
    hx, hy, hz = hx / size, hy / size, hz / size
    bx, by, bz = _normal(shape, hx, hy, hz)
    nx, ny, nz = r0 * bx + r1 * by + r2 * bz, r3 * bx + r4 * by + r5 * bz, r6 * bx + r7 * by + r8 * bz
    second = _second_color(shape, hx, hy, hz)
    diffuse = tl.maximum(nx * lx + ny * ly + nz * lz, 0.0)
    # A little floor light from below, sky light from above.
    ambient = 0.75 + 0.25 * ny
    # Blinn-Phong highlight.
    ex, ey, ez = lx - dx, ly - dy, lz - dz
    half = (nx * ex + ny * ey + nz * ez) / tl.sqrt(ex * ex + ey * ey + ez * ez + 1e-12)
    shine = tl.exp(50.0 * (tl.minimum(half, 1.0) - 1.0) * 1.6)
    facing = 1.0 - tl.maximum(-(nx * dx + ny * dy + nz * dz), 0.0)
    rim = 0.18 * facing * facing * facing
    gloss = tl.where(diffuse > 0.0, 0.35 * shine, 0.0)
    red = tl.where(second, tl.load(s + 5), tl.load(s + 2))
    green = tl.where(second, tl.load(s + 6), tl.load(s + 3))
    blue = tl.where(second, tl.load(s + 7), tl.load(s + 4))
    red = red * (ambient * tl.load(s + 28) + diffuse * tl.load(s + 25)) + gloss * tl.load(s + 25) + rim * tl.load(s + 19)
    green = green * (ambient * tl.load(s + 29) + diffuse * tl.load(s + 26)) + gloss * tl.load(s + 26) + rim * tl.load(s + 20)
    blue = blue * (ambient * tl.load(s + 30) + diffuse * tl.load(s + 27)) + gloss * tl.load(s + 27) + rim * tl.load(s + 21)
    return red, green, blue


@triton.jit
def _hash(n):
    """Pseudo-random number in [0, 1) for every integer-valued float."""
    v = tl.sin(n * 12.9898 + 4.1) * 43.7585
    return v - tl.floor(v)


@triton.jit
def _floor_mix(texture, x, z, distance):
    """How much of the floor's second colour shows at (x, z), 0..1; fades far away."""
    fade = tl.minimum(tl.maximum(1.0 - (distance - 8.0) / 12.0, 0.0), 1.0)
    if texture == 0:  # plain: large quiet squares
        fx, fz = tl.floor(x / 1.4 + 0.5), tl.floor(z / 1.4 + 0.5)
        odd = fx + fz - 2.0 * tl.floor((fx + fz) * 0.5)
        mix = 0.5 + (odd - 0.5) * fade
    elif texture == 1:  # checkered
        fx, fz = tl.floor(x / 0.9 + 0.5), tl.floor(z / 0.9 + 0.5)
        odd = fx + fz - 2.0 * tl.floor((fx + fz) * 0.5)
        mix = 0.5 + (odd - 0.5) * fade
    elif texture == 2:  # tiles with grout
        gx, gz = x / 0.8 + 0.5, z / 0.8 + 0.5
        gx, gz = tl.abs(gx - tl.floor(gx) - 0.5), tl.abs(gz - tl.floor(gz) - 0.5)
        mix = tl.where(tl.maximum(gx, gz) > 0.46, 0.9 * fade, 0.06)
    elif texture == 3:  # planks along z
        board = tl.floor(x / 0.55)
        inside = x / 0.55 - board
        grain = 0.5 + 0.5 * tl.sin(38.0 * inside + 3.0 * tl.sin(1.3 * z + 9.0 * _hash(board)) + 20.0 * _hash(board + 7.0))
        mix = tl.where(tl.abs(inside - 0.5) > 0.465, 1.0, 0.55 * _hash(board) + 0.16 * grain)
        mix = 0.35 + (mix - 0.35) * fade
    else:  # stripes across
        band = x / 1.0 + 0.25
        mix = 0.5 + tl.where(band - tl.floor(band) > 0.5, 0.5, -0.5) * fade
    return mix


@triton.jit
def _to_byte(linear):
    """Soft shoulder, gamma 2.2, 0..255."""
    v = linear / (1.0 + 0.12 * linear)
    v = tl.exp(tl.log(tl.maximum(v, 1e-6)) / 2.2)
    return (tl.minimum(v, 1.0) * 255.0 + 0.5).to(tl.uint8)


@triton.jit
def _ray_color(s, shape, size, texture, px, py, pz, r0, r1, r2, r3, r4, r5, r6, r7, r8, dx, dy, dz):
    """Linear RGB seen by camera rays of world direction (dx, dy, dz)."""
    cx, cy, cz = tl.load(s + 31), tl.load(s + 32), tl.load(s + 33)
    lx, ly, lz = tl.load(s + 22), tl.load(s + 23), tl.load(s + 24)
    up = tl.minimum(tl.maximum(dy * 3.2, 0.0), 1.0)
    red = tl.load(s + 19) + (tl.load(s + 16) - tl.load(s + 19)) * up
    green = tl.load(s + 20) + (tl.load(s + 17) - tl.load(s + 20)) * up
    blue = tl.load(s + 21) + (tl.load(s + 18) - tl.load(s + 21)) * up
    # Floor.
    on_floor = dy < -0.004
    t = tl.where(on_floor, -cy / tl.minimum(dy, -0.004), 1e4)
    fx, fz = cx + t * dx, cz + t * dz
    mix = _floor_mix(texture, fx, fz, t)
    reach = 1.45 * size
    seen = lx * 0.0 + fx * 0.0 + 1.0
    towards, near, far = _near(fx, 0.0 * fx, fz, lx, ly, lz, px, py, pz, reach + 0.6)
    towards = towards & on_floor
    ox, oy, oz = _to_body(fx, 0.0 * fx, fz, px, py, pz, r0, r1, r2, r3, r4, r5, r6, r7, r8)
    if tl.max(towards.to(tl.int32)) > 0:
        bx, by, bz = _to_body(lx, ly, lz, 0.0, 0.0, 0.0, r0, r1, r2, r3, r4, r5, r6, r7, r8)
        share = _penumbra(shape, size, ox, oy, oz, bx, by, bz, near, far, 28)
        seen = tl.where(towards, share, 1.0)
    contact = size * _distance(shape, ox / size, oy / size, oz / size)
    contact = 0.45 + 0.55 * tl.minimum(tl.maximum(contact / (0.9 * size), 0.0), 1.0)
    haze = tl.minimum(tl.maximum((t - 9.0) / 45.0, 0.0), 1.0)
    haze = haze * (2.0 - haze)
    f0 = tl.load(s + 9) + (tl.load(s + 12) - tl.load(s + 9)) * mix
    f1 = tl.load(s + 10) + (tl.load(s + 13) - tl.load(s + 10)) * mix
    f2 = tl.load(s + 11) + (tl.load(s + 14) - tl.load(s + 11)) * mix
    f0 = f0 * (contact * tl.load(s + 28) + seen * ly * tl.load(s + 25))
    f1 = f1 * (contact * tl.load(s + 29) + seen * ly * tl.load(s + 26))
    f2 = f2 * (contact * tl.load(s + 30) + seen * ly * tl.load(s + 27))
    # Mirror image on glossy floors: of the body where the mirrored ray meets it, else of the sky.
    gloss = tl.load(s + 15) * (0.5 + 0.5 * (1.0 + dy) * (1.0 + dy))
    m0, m1, m2 = tl.load(s + 19) * 0.9, tl.load(s + 20) * 0.9, tl.load(s + 21) * 0.9
    meets, near, far = _near(fx, 0.0 * fx, fz, dx, -dy, dz, px, py, pz, reach)
    meets = meets & on_floor
    m0, m1, m2 = m0 + 0.0 * fx, m1 + 0.0 * fx, m2 + 0.0 * fx
    if tl.max(meets.to(tl.int32)) > 0:
        bx, by, bz = _to_body(dx, -dy, dz, 0.0, 0.0, 0.0, r0, r1, r2, r3, r4, r5, r6, r7, r8)
        tm, hit = _march(shape, size, ox, oy, oz, bx, by, bz, near, far, 20)
        b0, b1, b2 = _shade_body(shape, size, s, lx, ly, lz, dx, -dy, dz, ox + tm * bx, oy + tm * by, oz + tm * bz,
                                 r0, r1, r2, r3, r4, r5, r6, r7, r8)
        hit = hit & meets
        m0, m1, m2 = tl.where(hit, b0, m0), tl.where(hit, b1, m1), tl.where(hit, b2, m2)
    f0, f1, f2 = f0 + gloss * (m0 - f0), f1 + gloss * (m1 - f1), f2 + gloss * (m2 - f2)
    f0 = f0 + haze * (tl.load(s + 19) - f0)
    f1 = f1 + haze * (tl.load(s + 20) - f1)
    f2 = f2 + haze * (tl.load(s + 21) - f2)
    red, green, blue = tl.where(on_floor, f0, red), tl.where(on_floor, f1, green), tl.where(on_floor, f2, blue)
    # The body itself.
    meets, near, far = _near(cx + 0.0 * dx, cy + 0.0 * dx, cz + 0.0 * dx, dx, dy, dz, px, py, pz, reach)
    if tl.max(meets.to(tl.int32)) > 0:
        ex, ey, ez = _to_body(cx, cy, cz, px, py, pz, r0, r1, r2, r3, r4, r5, r6, r7, r8)
        bx, by, bz = _to_body(dx, dy, dz, 0.0, 0.0, 0.0, r0, r1, r2, r3, r4, r5, r6, r7, r8)
        tb, hit = _march(shape, size, ex, ey, ez, bx, by, bz, near, far, 36)
        b0, b1, b2 = _shade_body(shape, size, s, lx, ly, lz, dx, dy, dz, ex + tb * bx, ey + tb * by, ez + tb * bz,
                                 r0, r1, r2, r3, r4, r5, r6, r7, r8)
        hit = hit & meets & (tb < t + 0.01)
        red, green, blue = tl.where(hit, b0, red), tl.where(hit, b1, green), tl.where(hit, b2, blue)
    return red, green, blue


@triton.jit
def _render_kernel(static, poses, out, frames, height, width,
                   STATIC_: tl.constexpr, POSE_: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, j): pixels j*BLOCK.. of frame i; `out` is uint8 [clips * frames, 3, height, width]."""
    frame = tl.program_id(0)
    s = static + (frame // frames) * STATIC_
    p = poses + frame * POSE_
    shape, size, texture = tl.load(s).to(tl.int32), tl.load(s + 1), tl.load(s + 8).to(tl.int32)
    px, py, pz = tl.load(p), tl.load(p + 1), tl.load(p + 2)
    r0, r1, r2 = tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
    r3, r4, r5 = tl.load(p + 6), tl.load(p + 7), tl.load(p + 8)
    r6, r7, r8 = tl.load(p + 9), tl.load(p + 10), tl.load(p + 11)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = pixel // width, pixel % width
    tan = tl.load(s + 43)
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    for sample in range(4):
        sx, sy = 0.25 + 0.5 * (sample % 2), 0.25 + 0.5 * (sample // 2)
        u = (2.0 * (column + sx) - width) / height * tan
        v = (height - 2.0 * (row + sy)) / height * tan
        dx = tl.load(s + 40) + u * tl.load(s + 34) + v * tl.load(s + 37)
        dy = tl.load(s + 41) + u * tl.load(s + 35) + v * tl.load(s + 38)
        dz = tl.load(s + 42) + u * tl.load(s + 36) + v * tl.load(s + 39)
        n = 1.0 / tl.sqrt(dx * dx + dy * dy + dz * dz)
        r, g, b = _ray_color(s, shape, size, texture, px, py, pz, r0, r1, r2, r3, r4, r5, r6, r7, r8,
                             dx * n, dy * n, dz * n)
        red, green, blue = red + 0.25 * r, green + 0.25 * g, blue + 0.25 * b
    inside = pixel < height * width
    base = out + frame.to(tl.int64) * 3 * height * width + pixel
    tl.store(base, _to_byte(red), inside)
    tl.store(base + height * width, _to_byte(green), inside)
    tl.store(base + 2 * height * width, _to_byte(blue), inside)


def render(static: Tensor, poses: Tensor, height: int, width: int, block: int = 256) -> Tensor:
    """Clips as uint8 [B, F, 3, height, width] from static [B, STATIC] and poses [B, F, POSE]."""
    clips, frames = poses.shape[:2]
    assert static.shape == (clips, STATIC) and poses.shape[2] == POSE
    out = torch.empty(clips, frames, 3, height, width, dtype=torch.uint8, device=static.device)
    grid = (clips * frames, triton.cdiv(height * width, block))
    _render_kernel[grid](static.contiguous(), poses.contiguous(), out, frames, height, width,
                         STATIC_=STATIC, POSE_=POSE, BLOCK=block)
    return out
