"""The user's side of the world: 24 captioned pictures in the target style, laid out for kohya's trainer."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
from PIL import Image

from examples.tiny_world.paths import DATASET, DATASET_TOML
from examples.tiny_world.scenes import BACKGROUNDS, COLORS, SHAPES, TARGET_LIGHTING, Scene, draw_scene, render

NUM_REPEATS = 6  # two epochs then train at least three times as long as one evaluation of 8 samples takes


def dataset_scenes(seed: int = 24) -> list[Scene]:
    """Every shape in every colour once; each background four times."""
    rng = np.random.default_rng(seed)
    backgrounds = itertools.cycle(rng.permutation(list(BACKGROUNDS)))
    pairs = [(shape, color) for color in COLORS for shape in SHAPES]
    return [
        draw_scene(rng, TARGET_LIGHTING, shape=shape, color=color, background=str(next(backgrounds)))
        for shape, color in pairs
    ]


def write_dataset() -> None:
    folder = DATASET / "pixar_style"
    shutil.rmtree(DATASET, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, scene in enumerate(dataset_scenes()):
        name = f"{index:02d}_{scene.color}_{scene.shape}"
        Image.fromarray(render(scene)).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(scene.caption + "\n")
    DATASET_TOML.write_text(
        f"""# A kohya sd-scripts dataset configuration; image_dir is relative to this file.
[general]
caption_extension = ".txt"
enable_bucket = false

[[datasets]]
resolution = 64
batch_size = 4

  [[datasets.subsets]]
  image_dir = "dataset/pixar_style"
  num_repeats = {NUM_REPEATS}
"""
    )
