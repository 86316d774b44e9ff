"""Brightness, contrast and saturation of reference pictures, for a scoring with targets = "dataset"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from PIL import Image, UnidentifiedImageError

from evaluator_daemon.metrics.pixels import pixel_statistics
from shared.errors import SettingsError
from shared.held_out import measured_pictures
from shared.schemas.pictures import Picture


def measure_targets(pictures: Sequence[Picture]) -> Mapping[str, float]:
    """Return the means over the pictures, on the 0-1 scale, defined as for the renders.

    Where there are many, `measured_pictures` says which are looked at.

    Raises:
        SettingsError: one is no picture.
    """
    found = []
    for picture in measured_pictures(pictures):
        try:
            with Image.open(picture.path) as image:
                found.append(pixel_statistics(np.asarray(image.convert("RGB"))))
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise SettingsError(
                "--reference-pictures", picture.path, f"mend or remove that picture ({error})"
            ) from error
    return {
        "brightness": fmean(statistics.brightness for statistics in found),
        "contrast": fmean(statistics.contrast for statistics in found),
        "saturation": fmean(statistics.saturation for statistics in found),
    }
