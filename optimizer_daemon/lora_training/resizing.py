"""Resizing as kohya's sd-scripts does it, to the last bit: with Pillow or OpenCV by the name of the interpolation."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optimizer_daemon.lora_training.buckets import Size
from optimizer_daemon.lora_training.dataset_settings import Interpolation

Pixels = NDArray[np.uint8]

_PILLOW: Mapping[Interpolation, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_OPENCV: Mapping[Interpolation, int] = {
    "area": cv2.INTER_AREA,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST_EXACT,  # which of two equally near pixels differs between versions of OpenCV
}
_ALIASES: Mapping[Interpolation, Interpolation] = {"linear": "bilinear", "cubic": "bicubic"}


def interpolation_for(size: Size, resized: Size, asked: Interpolation | None) -> Interpolation:
    """Return what an image is resized with: what was asked for, else area to shrink and lanczos to enlarge."""
    if asked is not None:
        return _ALIASES.get(asked, asked)
    return "area" if size[0] >= resized[0] and size[1] >= resized[1] else "lanczos"


def resize(pixels: Pixels, resized: Size, interpolation: Interpolation) -> Pixels:
    """Return the image at another size.

    Args:
        pixels: (height, width, 3).
        resized: width and height.
        interpolation: as `interpolation_for` says.
    """
    if interpolation in _PILLOW:
        return np.asarray(Image.fromarray(pixels).resize(resized, _PILLOW[interpolation]))
    return np.asarray(cv2.resize(pixels, resized, interpolation=_OPENCV[interpolation]), dtype=np.uint8)
