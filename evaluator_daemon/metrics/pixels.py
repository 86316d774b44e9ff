"""What the pixels of one picture say without any network; always computed.

Definitions are those of the user's scripts, all on the 0-1 scale: brightness is the mean of RGB/255, contrast the
standard deviation of RGB/255 over all pixels and channels, saturation the mean S of HSV.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import RenderedSet, measured
from shared.schemas import Metric

BLACK_BRIGHTNESS = 0.02
FLAT_CONTRAST = 0.02


@dataclass(frozen=True)
class PixelStatistics:
    """One picture's numbers, 0-1 except `sharpness` (variance of the Laplacian of the luma, 0 and up)."""

    brightness: float
    contrast: float
    saturation: float
    sharpness: float


def pixel_statistics(picture: NDArray[np.uint8]) -> PixelStatistics:
    """Measure one picture.

    Args:
        picture: (height, width, 3) uint8 sRGB, at least 3 x 3 pixels.
    Raises:
        ValueError: another shape or dtype.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < 3:
        raise ValueError(f"a picture is (height, width, 3) uint8, not {picture.shape} {picture.dtype}")
    rgb = picture.astype(np.float64) / 255
    high, low = rgb.max(axis=2), rgb.min(axis=2)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return PixelStatistics(float(rgb.mean()), float(rgb.std()), float(saturation.mean()), float(laplacian.var()))


def sentinel(statistics: PixelStatistics) -> str | None:
    """Return why a picture shows nothing ("black", "flat"), or None. A NaN decode is black in uint8."""
    if statistics.brightness < BLACK_BRIGHTNESS:
        return "black"
    if statistics.contrast < FLAT_CONTRAST:
        return "flat"
    return None


class PixelMetrics:
    """Always available: brightness, contrast, saturation, sharpness, and the difference from the base model."""

    def __init__(self, job: Job) -> None:
        del job  # needs nothing of it

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        statistics = [pixel_statistics(picture) for picture in rendered.pictures]
        metrics = {
            "brightness": measured([s.brightness for s in statistics], "target"),
            "contrast": measured([s.contrast for s in statistics], "target"),
            "saturation": measured([s.saturation for s in statistics], "target"),
            "sharpness": measured([s.sharpness for s in statistics], "maximise"),
        }
        if rendered.base is not None:
            pairs = zip(rendered.pictures, rendered.base, strict=True)
            metrics["base_difference"] = measured([mean_difference(a, b) for a, b in pairs], "target")
        return metrics


def mean_difference(picture: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Mean absolute difference of RGB/255, 0-1."""
    return float(np.abs(picture.astype(np.int16) - other.astype(np.int16)).mean() / 255)
