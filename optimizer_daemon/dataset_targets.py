"""Brightness, contrast and saturation of the training pictures: the targets of a user's own style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image, UnidentifiedImageError

from shared.errors import SettingsError
from shared.held_out import measured_pictures
from shared.schemas.pictures import Picture


def measure_targets(pictures: Sequence[Picture]) -> Mapping[str, float]:
    """Return the means over the pictures, on the 0-1 scale, defined as for the renders, to the last bit.

    Where there are many, `measured_pictures` says which are looked at.

    Raises:
        SettingsError: one is no picture.
    """
    found = [_statistics(Path(picture.path)) for picture in measured_pictures(pictures)]
    return dict(zip(("brightness", "contrast", "saturation"), map(fmean, zip(*found, strict=True)), strict=True))


def _statistics(file: Path) -> tuple[float, float, float]:
    try:
        with Image.open(file) as image:
            rgb = np.asarray(image.convert("RGB"), np.float64) / 255
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError("--dataset-config", str(file), f"mend or remove that picture ({error})") from error
    high, low = rgb.max(axis=2), rgb.min(axis=2)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    return float(rgb.mean()), float(rgb.std()), float(saturation.mean())
