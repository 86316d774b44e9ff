"""Pools of rendered scenes, drawn on all cores, and the captions that go with them."""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.tiny_world.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, draw_scene, render

COMBINATIONS = tuple(itertools.product(SHAPES, COLORS, BACKGROUNDS))  # 144 of (shape, colour, background)


@dataclass(frozen=True)
class Pool:
    """`images` is (n, 64, 64, 3) uint8; `scenes[i]` made `images[i]`."""

    images: NDArray[np.uint8]
    scenes: tuple[Scene, ...]


def render_pool(seed: int, count: int, lightings: tuple[str, ...]) -> Pool:
    """Render `count` scenes, every combination and lighting equally often (up to rounding)."""
    rng = np.random.default_rng(seed)
    scenes = []
    for i in range(count):
        shape, color, background = COMBINATIONS[i % len(COMBINATIONS)]
        lighting = lightings[(i // len(COMBINATIONS)) % len(lightings)]
        scenes.append(draw_scene(rng, lighting, shape=shape, color=color, background=background))
    with ProcessPoolExecutor() as workers:
        images = np.stack(list(workers.map(render, scenes, chunksize=64)))
    return Pool(images, tuple(scenes))


def pool_contrast(images: NDArray[np.uint8]) -> tuple[float, float]:
    """Return (mean brightness, mean contrast) of a pool on the 0-1 scale."""
    values = images.astype(np.float32) / 255
    return float(values.mean()), float(values.std(axis=(1, 2, 3)).mean())
