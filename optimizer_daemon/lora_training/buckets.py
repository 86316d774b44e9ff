"""Which size an image is trained at: the arithmetic of kohya's sd-scripts (library/train_util.py, BucketManager)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Fit:
    """How one image becomes a training image: resized, then cropped to the bucket around its centre."""

    resized: Size
    bucket: Size


@dataclass(frozen=True)
class BucketRule:
    """How a data set sizes its images.

    Args:
        resolution: the training size; with buckets its area is the largest one.
        enable_bucket: images keep about their own aspect ratio; otherwise all get `resolution`.
        min_side, max_side: bounds of a bucket's sides; without meaning when `no_upscale`.
        step: a bucket's sides are multiples of this.
        no_upscale: images are never enlarged; their own size decides the bucket.
    """

    resolution: Size
    enable_bucket: bool = False
    min_side: int = 256
    max_side: int = 1024
    step: int = 64
    no_upscale: bool = False

    def sizes(self) -> list[Size]:
        """Return the buckets to choose from; none when `no_upscale`, where the images decide."""
        if not self.enable_bucket:
            return [self.resolution]
        return [] if self.no_upscale else bucket_sizes(self.resolution, self.min_side, self.max_side, self.step)

    def fit(self, image: Size) -> Fit:
        """Return how an image of this size is used; a side of the bucket is 0 when the image is smaller than a step."""
        if self.enable_bucket and self.no_upscale:
            return _fit_without_upscaling(image, self.resolution, self.step)
        return _fit_to_closest(image, self.sizes())


def bucket_sizes(resolution: Size, min_side: int, max_side: int, step: int) -> list[Size]:
    """Return every bucket of at most the resolution's area, sorted; bounds that are no multiple of `step` give way."""
    min_side -= min_side % step
    max_side += -max_side % step
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)}
    for width in range(min_side, max_side + 1, step):
        height = min(max_side, int((area // width) // step) * step)
        if height >= min_side:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def _fit_to_closest(image: Size, sizes: Sequence[Size]) -> Fit:
    width, height = image
    aspect = width / height
    bucket = image if image in sizes else min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))
    # The whole bucket is covered: the side that is too long for it will be cropped.
    scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
    return Fit(resized=(int(width * scale + 0.5), int(height * scale + 0.5)), bucket=bucket)


def _fit_without_upscaling(image: Size, resolution: Size, step: int) -> Fit:
    width, height = image
    area = resolution[0] * resolution[1]
    resized = image
    if width * height > area:
        aspect = width / height
        ideal_width = math.sqrt(area * aspect)
        by_width = _round_down(ideal_width, step)
        by_height = _round_down(area / ideal_width, step)
        # Make that side a multiple of the step which leaves the aspect ratio truer.
        error_by_width = abs(by_width / max(1, _round_down(by_width / aspect, step)) - aspect)
        error_by_height = abs(_round_down(by_height * aspect, step) / max(1, by_height) - aspect)
        if error_by_width < error_by_height:
            resized = (by_width, int(by_width / aspect + 0.5))
        else:
            resized = (int(by_height * aspect + 0.5), by_height)
    return Fit(resized=resized, bucket=(resized[0] - resized[0] % step, resized[1] - resized[1] % step))


def _round_down(length: float, step: int) -> int:
    whole = int(length + 0.5)
    return whole - whole % step
