"""Brightness, contrast and saturation of the training pictures: the targets of a user's own style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from shared.errors import SettingsError
from shared.schemas.pictures import Picture

MOST_PICTURES = 200
"""The mean of so many is good to a few thousandths; more would only take time."""


def measure_targets(pictures: Sequence[Picture]) -> Mapping[str, float]:
    """Return the means over the pictures, on the 0-1 scale, defined as for the renders.

    Where there are more than MOST_PICTURES, evenly spaced ones in the order of their contents are looked at.

    Raises:
        SettingsError: one is no picture.
    """
    ordered = sorted(pictures, key=lambda picture: picture.sha256)
    step = max(1, len(ordered) // MOST_PICTURES)
    means = np.mean([_statistics(Path(picture.path)) for picture in ordered[::step]], axis=0)
    return dict(zip(("brightness", "contrast", "saturation"), (float(mean) for mean in means), strict=True))


def _statistics(file: Path) -> tuple[float, float, float]:
    try:
        with Image.open(file) as image:
            rgb = np.asarray(image.convert("RGB"), np.float64) / 255
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise SettingsError("--dataset-config", str(file), f"mend or remove that picture ({error})") from error
    high, low = rgb.max(axis=2), rgb.min(axis=2)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    return float(rgb.mean()), float(rgb.std()), float(saturation.mean())
