"""What pixels alone say about a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from evaluator_daemon.metrics.pixels import pixel_statistics, sentinel


def solid(*rgb: int) -> np.ndarray:
    return np.full((16, 16, 3), rgb, np.uint8)


NOISE = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)


def test_brightness_and_contrast_are_mean_and_deviation_of_rgb_over_255():
    statistics = pixel_statistics(NOISE)
    assert statistics.brightness == pytest.approx(NOISE.mean() / 255)
    assert statistics.contrast == pytest.approx(NOISE.std() / 255)


def test_saturation_agrees_with_pillows_hsv():
    hsv = np.asarray(Image.fromarray(NOISE).convert("HSV"))
    assert pixel_statistics(NOISE).saturation == pytest.approx(hsv[..., 1].mean() / 255, abs=0.003)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        pytest.param(solid(0, 0, 0), "black", id="black"),
        pytest.param(solid(4, 4, 4), "black", id="nearly black"),
        pytest.param(solid(128, 128, 128), "flat", id="one gray"),
        pytest.param(solid(255, 255, 255), "flat", id="white"),
        pytest.param(NOISE, None, id="a picture"),
    ],
)
def test_sentinels_name_pictures_that_show_nothing(picture, expected):
    assert sentinel(pixel_statistics(picture)) == expected


def test_blur_lowers_sharpness():
    blurred = (NOISE[:-1, :-1] // 4 + NOISE[1:, :-1] // 4 + NOISE[:-1, 1:] // 4 + NOISE[1:, 1:] // 4).astype(np.uint8)
    assert pixel_statistics(blurred).sharpness < pixel_statistics(NOISE).sharpness / 2


@pytest.mark.parametrize("bad", [NOISE.astype(np.float32), NOISE[..., :1], NOISE[:2]], ids=["float", "gray", "tiny"])
def test_anything_but_an_rgb_uint8_picture_is_refused(bad):
    with pytest.raises(ValueError, match="a picture is"):
        pixel_statistics(bad)
