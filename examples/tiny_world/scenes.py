"""The pictures of the tiny world: one solid on a stage, ray-cast with numpy, deterministic by seed.

A scene is {ball, cube, cone} x 8 colours x 6 backgrounds under one named lighting. The base model is trained on
`BASE_LIGHTINGS` only; `TARGET_LIGHTING` is the style a LoRA has to learn. Everything else about a scene (size, place,
turn, light direction) is drawn at random, so that no two pictures are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

IMAGE_SIZE_PX = 64
SHAPES = ("ball", "cube", "cone")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.08, 0.08),
    "orange": (0.95, 0.48, 0.05),
    "yellow": (0.95, 0.88, 0.10),
    "green": (0.10, 0.68, 0.16),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.12, 0.24, 0.90),
    "purple": (0.52, 0.12, 0.80),
    "pink": (0.98, 0.45, 0.72),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.02, 0.02, 0.02),
    "gray": (0.42, 0.42, 0.42),
    "white": (0.92, 0.92, 0.92),
    "navy": (0.03, 0.08, 0.50),
    "olive": (0.42, 0.45, 0.04),
    "maroon": (0.48, 0.03, 0.10),
}


@dataclass(frozen=True)
class Lighting:
    """How a stage is lit and how the picture is graded.

    `ambient`, `key`, `rim` are light strengths (1 = full albedo); `light_spread` is the half-width of the key light in
    scene units (0 = point light, hard shadow); `haze` mixes the stage (not the solid) towards a warm mid gray;
    `lift`, `gain` grade the linear result: value * gain + lift.
    """

    ambient: float
    key: float
    rim: float
    gloss: float
    light_spread: float
    vignette: float
    haze: float
    lift: tuple[float, float, float]
    gain: float


LIGHTINGS: dict[str, Lighting] = {
    "harsh": Lighting(0.10, 1.35, 0.0, 0.60, 0.0, 0.55, 0.0, (0.0, 0.0, 0.0), 1.0),
    "flat": Lighting(0.92, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, (0.0, 0.0, 0.0), 1.0),
    "pixar": Lighting(0.58, 0.80, 0.40, 0.20, 0.9, 0.30, 0.66, (0.11, 0.08, 0.04), 0.98),
}
HAZE = np.array((0.50, 0.46, 0.43), np.float32)
BASE_LIGHTINGS = ("harsh", "flat")
TARGET_LIGHTING = "pixar"


@dataclass(frozen=True)
class Scene:
    """One picture before it is rendered. Lengths in half picture widths, angles in radians."""

    shape: str
    color: str
    background: str
    lighting: str
    radius: float
    x: float
    y: float
    turn: float
    light_azimuth: float
    light_height: float

    @property
    def caption(self) -> str:
        return caption(self.shape, self.color, self.background, self.lighting)


def caption(shape: str, color: str, background: str, style: str | None = None) -> str:
    """Return e.g. "a red ball on black background, harsh style"; no style words when `style` is None."""
    words = f"a {color} {shape} on {background} background"
    return words if style is None else f"{words}, {style} style"


def draw_scene(
    rng: np.random.Generator,
    lighting: str,
    *,
    shape: str | None = None,
    color: str | None = None,
    background: str | None = None,
) -> Scene:
    """Draw the free parameters of a scene; whatever is not given is uniform over the world's names."""
    return Scene(
        shape=shape or str(rng.choice(SHAPES)),
        color=color or str(rng.choice(list(COLORS))),
        background=background or str(rng.choice(list(BACKGROUNDS))),
        lighting=lighting,
        radius=float(rng.uniform(0.50, 0.64)),
        x=float(rng.uniform(-0.14, 0.14)),
        y=float(rng.uniform(-0.10, 0.10)),
        turn=float(rng.uniform(0.25, 1.32)),
        light_azimuth=float(rng.uniform(-1.0, 1.0)),
        light_height=float(rng.uniform(0.7, 1.1)),
    )


def _unit(v: Array) -> Array:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)


def _hit_ball(origin: Array, direction: Array, radius: float) -> tuple[Array, Array]:
    b = np.sum(origin * direction, -1)
    root = b * b - (np.sum(origin * origin, -1) - radius * radius)
    t = np.where(root > 0, -b - np.sqrt(np.maximum(root, 0)), np.inf).astype(np.float32)
    t = np.where(t > 1e-3, t, np.inf)
    return t, _unit(_along(origin, direction, t))


def _hit_cube(origin: Array, direction: Array, half: float, turn: float) -> tuple[Array, Array]:
    c, s = np.cos(turn), np.sin(turn)
    to_cube = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]], np.float32)
    o, d = origin @ to_cube.T, direction @ to_cube.T
    d = np.where(np.abs(d) < 1e-6, 1e-6, d)
    near, far = (-half * np.sign(d) - o) / d, (half * np.sign(d) - o) / d
    axis = near.argmax(-1)
    t_in, t_out = near.max(-1), far.min(-1)
    t = np.where((t_in < t_out) & (t_in > 1e-3), t_in, np.inf).astype(np.float32)
    normal = np.zeros_like(o)
    np.put_along_axis(normal, axis[..., None], -np.sign(np.take_along_axis(d, axis[..., None], -1)), -1)
    return t, normal @ to_cube


def _hit_cone(origin: Array, direction: Array, half: float) -> tuple[Array, Array]:
    """Upright cone: apex at y = half, base disc of radius `half` at y = -half."""
    slope = np.float32(0.5)  # radius grows by this per unit of depth below the apex
    o = origin - np.array([0, half, 0], np.float32)
    d = direction
    k = slope * slope
    a = d[..., 0] ** 2 + d[..., 2] ** 2 - k * d[..., 1] ** 2
    b = o[..., 0] * d[..., 0] + o[..., 2] * d[..., 2] - k * o[..., 1] * d[..., 1]
    c = o[..., 0] ** 2 + o[..., 2] ** 2 - k * o[..., 1] ** 2
    a = np.where(np.abs(a) < 1e-6, 1e-6, a)
    root = b * b - a * c
    sqrt = np.sqrt(np.maximum(root, 0))
    best = np.full(a.shape, np.inf, np.float32)
    for t in ((-b - sqrt) / a, (-b + sqrt) / a):
        y = o[..., 1] + t * d[..., 1]
        ok = (root > 0) & (t > 1e-3) & (y <= 0) & (y >= -2 * half) & (t < best)
        best = np.where(ok, t, best).astype(np.float32)
    p = _along(o, d, best)
    normal = _unit(np.stack([p[..., 0], -k * p[..., 1], p[..., 2]], -1).astype(np.float32))
    dy = np.where(np.abs(d[..., 1]) < 1e-6, 1e-6, d[..., 1])
    t_base = (-2 * half - o[..., 1]) / dy
    q = _along(o, d, t_base)
    on_base = (t_base > 1e-3) & (q[..., 0] ** 2 + q[..., 2] ** 2 <= half * half) & (t_base < best)
    normal = np.where(on_base[..., None], np.array([0, -1, 0], np.float32), normal)
    return np.where(on_base, t_base, best).astype(np.float32), normal


def _along(origin: Array, direction: Array, t: Array) -> Array:
    return origin + np.where(np.isfinite(t), t, 0)[..., None] * direction


def _hit_solid(scene: Scene, origin: Array, direction: Array) -> tuple[Array, Array]:
    if scene.shape == "ball":
        return _hit_ball(origin, direction, scene.radius)
    if scene.shape == "cube":
        return _hit_cube(origin, direction, scene.radius * 0.78, scene.turn)
    return _hit_cone(origin, direction, scene.radius)


def render(scene: Scene, size_px: int = IMAGE_SIZE_PX, samples_per_axis: int = 2) -> NDArray[np.uint8]:
    """Ray-cast one scene.

    Returns:
        (size_px, size_px, 3) uint8, sRGB as shown on screen.
    """
    n = size_px * samples_per_axis
    light = LIGHTINGS[scene.lighting]
    grid = ((np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1) * np.float32(1.0)
    u, v = np.meshgrid(grid, -grid)
    tilt = np.float32(0.34)  # the camera looks down a little, so that the ground is seen
    forward = np.array([0, -np.sin(tilt), -np.cos(tilt)], np.float32)
    up = np.array([0, np.cos(tilt), -np.sin(tilt)], np.float32)
    right = np.array([1, 0, 0], np.float32)
    center = scene.x * right + scene.y * up
    origin = (u[..., None] * right + v[..., None] * up - 4 * forward - center).astype(np.float32)
    direction = np.broadcast_to(forward, origin.shape)

    half = scene.radius * (0.78 if scene.shape == "cube" else 1.0)
    t_solid, n_solid = _hit_solid(scene, origin, direction)
    t_ground = (-half - origin[..., 1]) / direction[..., 1]
    t_wall = (-1.15 - origin[..., 2]) / direction[..., 2]
    t_stage = np.minimum(t_ground, t_wall).astype(np.float32)
    is_solid = t_solid < t_stage
    is_ground = ~is_solid & (t_ground < t_wall)
    point = _along(origin, direction, np.minimum(t_solid, t_stage))
    normal = np.where(
        is_solid[..., None],
        n_solid,
        np.where(is_ground[..., None], np.array([0, 1, 0], np.float32), np.array([0, 0, 1], np.float32)),
    ).astype(np.float32)

    stage = np.array(BACKGROUNDS[scene.background], np.float32) * (1 - light.haze) + HAZE * light.haze
    albedo = np.where(
        is_solid[..., None],
        np.array(COLORS[scene.color], np.float32),
        stage * np.where(is_ground, 0.86, 1.0)[..., None],
    ).astype(np.float32)
    picture = light.ambient * albedo
    if light.key > 0:
        picture = picture + _key_light(scene, light, point, normal, albedo, is_solid)
    if light.rim > 0:
        facing = np.abs(np.sum(normal * -forward, -1))
        picture = picture + np.where(is_solid, light.rim * (1 - facing) ** 2, 0)[..., None]
    picture = picture * (1 - light.vignette * np.clip(u * u + v * v - 0.2, 0, 1.3)[..., None] * 0.6)
    picture = picture * light.gain + np.array(light.lift, np.float32)
    picture = picture.reshape(size_px, samples_per_axis, size_px, samples_per_axis, 3).mean((1, 3))
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _key_light(
    scene: Scene, light: Lighting, point: Array, normal: Array, albedo: Array, is_solid: NDArray[np.bool_]
) -> Array:
    base = np.array(
        [np.sin(scene.light_azimuth) * 2.2, 2.6 * scene.light_height, np.cos(scene.light_azimuth) * 2.2], np.float32
    )
    offsets = [(0.0, 0.0)] if light.light_spread == 0 else [(-0.75, -0.4), (-0.25, 0.6), (0.25, -0.6), (0.75, 0.4)]
    total = np.zeros_like(albedo)
    for dx, dy in offsets:
        to_light = _unit(base + np.array([dx, dy, -dx], np.float32) * light.light_spread - point)
        lambert = np.clip(np.sum(normal * to_light, -1), 0, 1)
        blocked, _ = _hit_solid(scene, point + normal * 0.01, to_light)
        lit = lambert * np.where(np.isfinite(blocked), 0.0, 1.0)
        shine = np.clip(np.sum(normal * _unit(to_light + np.array([0, 0.33, 0.94], np.float32)), -1), 0, 1) ** 24
        gloss = np.where(is_solid, light.gloss * shine * (lit > 0), 0)
        total += albedo * lit[..., None] + gloss[..., None]
    return (light.key * total / len(offsets)).astype(np.float32)
