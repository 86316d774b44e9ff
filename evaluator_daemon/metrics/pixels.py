"""What the pixels of one picture say without any network; always computed.

Definitions are those of the user's scripts, all on the 0-1 scale: brightness is the mean of RGB/255, contrast the
standard deviation of RGB/255 over all pixels and channels, saturation the mean S of HSV.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import Facts, Quantity, RenderedSet, measured
from shared.metric_names import Inputs
from shared.schemas import Metric
from shared.scores.formulas import BRIGHTNESS_RANGE, CONTRAST_RANGE, SATURATION_RANGE

BLACK_BRIGHTNESS = 0.02
FLAT_CONTRAST = 0.02
_RANGES = {"brightness": BRIGHTNESS_RANGE, "contrast": CONTRAST_RANGE, "saturation": SATURATION_RANGE}


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


def _share(bounds: tuple[float, float]) -> str:
    return f"share of pictures within {bounds[0]:g}-{bounds[1]:g}"


class PixelMetrics:
    """Always available; whatever it measures needs no weights."""

    facts = Facts(
        version="1",
        quantities={
            "brightness": Quantity("target", 0.0, 1.0, "mean of RGB/255"),
            "contrast": Quantity("target", 0.0, 0.5, "standard deviation of RGB/255"),
            "saturation": Quantity("target", 0.0, 1.0, "mean S of HSV"),
            "brightness_in_range": Quantity("maximise", 0.0, 1.0, _share(BRIGHTNESS_RANGE)),
            "contrast_in_range": Quantity("maximise", 0.0, 1.0, _share(CONTRAST_RANGE)),
            "saturation_in_range": Quantity("maximise", 0.0, 1.0, _share(SATURATION_RANGE)),
            "sharpness": Quantity("maximise", 0.0, 16.0, "variance of the luma's Laplacian"),
            "blank": Quantity("minimise", 0.0, 1.0, "share of black, flat or undecodable (NaN) pictures"),
            "base_difference": Quantity("target", 0.0, 1.0, "mean |RGB difference|/255 to the base model's picture"),
        },
        source="the user's scripts",
        code_licence="BSD-3-Clause (numpy)",
    )

    def __init__(self, job: Job) -> None:
        del job  # needs nothing of it

    @staticmethod
    def why_not(inputs: Inputs) -> str:
        del inputs
        return ""

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        statistics = [pixel_statistics(picture) for picture in rendered.pictures]
        values = {
            "brightness": [s.brightness for s in statistics],
            "contrast": [s.contrast for s in statistics],
            "saturation": [s.saturation for s in statistics],
            "sharpness": [s.sharpness for s in statistics],
            "blank": [float(sentinel(s) is not None) for s in statistics],
        }
        for name, bounds in _RANGES.items():
            values[f"{name}_in_range"] = [float(bounds[0] <= value <= bounds[1]) for value in values[name]]
        if rendered.base is not None:
            pairs = zip(rendered.pictures, rendered.base, strict=True)
            values["base_difference"] = [mean_difference(a, b) for a, b in pairs]
        return {name: measured(found, self.facts.quantities[name].direction) for name, found in values.items()}


def mean_difference(picture: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Mean absolute difference of RGB/255, 0-1."""
    return float(np.abs(picture.astype(np.int16) - other.astype(np.int16)).mean() / 255)
