"""What every metric offers, and how per-image values become a `Metric`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.schemas import Metric

Picture = NDArray[np.uint8]
Direction = Literal["minimise", "maximise", "target"]


@dataclass(frozen=True)
class RenderedSet:
    """One checkpoint's pictures.

    Args:
        pictures: each (height, width, 3) uint8 sRGB.
        prompts: picture i's prompt.
        base: the base model's pictures of the same samples; None when these are them.
    """

    pictures: Sequence[Picture]
    prompts: Sequence[str]
    base: Sequence[Picture] | None


class MetricSource(Protocol):
    """Made once per evaluator process with its job; measures one or more quantities."""

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        """Return each quantity by name; one that cannot be computed is unavailable with its reason."""


def measured(values: Sequence[float], direction: Direction, version: str = "1") -> Metric:
    """A quantity with one value per picture."""
    return Metric(
        version=version,
        direction=direction,
        status="ok",
        value=fmean(values),
        std=pstdev(values),
        per_image=tuple(values),
    )


def unavailable(reason: str, direction: Direction, version: str = "1") -> Metric:
    """A quantity that cannot be computed here."""
    return Metric(version=version, direction=direction, status="unavailable", reason=reason, value=None)
