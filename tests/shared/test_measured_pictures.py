"""Targets taken from pictures: both daemons look at the same ones and come to the same figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator_daemon.metrics import targets
from optimizer_daemon import dataset_targets
from shared.held_out import MOST_MEASURED, measured_pictures, pictures_in
from shared.schemas.pictures import Picture


def pictures(count: int) -> list[Picture]:
    return [Picture(path=f"/{i}.png", sha256=f"{i * 7919 % count:064x}") for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 199, 200, 201, 399, 400, 1013])
def test_at_most_two_hundred_evenly_spaced_by_content_stand_for_all(count):
    chosen = [int(picture.sha256, 16) for picture in measured_pictures(pictures(count))]
    assert len(chosen) == min(count, MOST_MEASURED)
    assert chosen == sorted(set(chosen))
    assert max(np.diff([*chosen, count]), default=1) <= -(-count // MOST_MEASURED)
    assert measured_pictures(pictures(count)[::-1]) == measured_pictures(pictures(count)), "in whatever order they come"


@pytest.mark.parametrize("count", [7, 402])
def test_both_daemons_measure_the_same_targets_to_the_last_bit(tmp_path: Path, count: int):
    rng = np.random.default_rng(count)
    modes = ("RGB", "L", "P", "RGBA", "CMYK")
    for i in range(count):
        mode = modes[i % len(modes)]
        suffix = "jpg" if mode == "CMYK" else "png"
        picture = Image.fromarray(rng.integers(0, 256, (5, 4 + i % 3, 3), np.uint8)).convert(mode)
        picture.save(tmp_path / f"{i}.{suffix}")
    found = pictures_in(tmp_path, "--reference-pictures")
    assert len(found) == count
    assert targets.measure_targets(found) == dataset_targets.measure_targets(found[::-1])
