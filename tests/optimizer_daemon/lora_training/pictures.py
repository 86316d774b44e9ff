"""Image folders and their dataset TOML, as a user has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(
    folder: Path, captions: Mapping[str, str | None], size: tuple[int, int] = (64, 64), seed: int = 0
) -> Path:
    """Write one smooth picture per name, with its caption in a .txt file unless that is None."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name, caption in captions.items():
        corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
        picture = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
        picture.save(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def write_dataset(
    folder: Path,
    captions: Mapping[str, str | None] | None = None,
    *,
    dataset: str = "resolution = 64\nbatch_size = 2",
    subset: str = "",
    general: str = "",
) -> Path:
    """Write a folder of images beside a dataset TOML that names it; return the TOML."""
    if captions is None:
        captions = {"a": "a red ball, soft light", "b": "a blue cube, soft light", "c": "a green cone, soft light"}
    write_images(folder / "images", captions)
    path = folder / "dataset.toml"
    path.write_text(
        f"""[general]
caption_extension = ".txt"
{general}

[[datasets]]
{dataset}

  [[datasets.subsets]]
  image_dir = "images"
{subset}
"""
    )
    return path
