"""Sizes of training images; the figures are what sd-scripts 48d368f computes for them."""

from __future__ import annotations

import pytest

from optimizer_daemon.lora_training.buckets import BucketRule, Fit, bucket_sizes

SQUARE = BucketRule((512, 512))
BUCKETS = BucketRule((512, 512), enable_bucket=True)
NO_UPSCALE = BucketRule((512, 512), enable_bucket=True, no_upscale=True)
SMALL = BucketRule((64, 64), enable_bucket=True, min_side=32, max_side=128, step=8)


def test_the_buckets_of_512():
    wide = [(576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
    assert bucket_sizes((512, 512), 256, 1024, 64) == sorted([(512, 512), *wide, *((h, w) for w, h in wide)])


def test_bounds_give_way_to_the_step():
    assert bucket_sizes((512, 512), 300, 1000, 64) == bucket_sizes((512, 512), 256, 1024, 64)


@pytest.mark.parametrize(
    ("rule", "image", "bucket", "resized"),
    [
        (SQUARE, (512, 512), (512, 512), (512, 512)),
        (SQUARE, (600, 400), (512, 512), (768, 512)),
        (SQUARE, (100, 200), (512, 512), (512, 1024)),
        (BUCKETS, (512, 512), (512, 512), (512, 512)),
        (BUCKETS, (600, 400), (640, 384), (640, 427)),
        (BUCKETS, (1920, 1080), (640, 384), (683, 384)),
        (BUCKETS, (100, 100), (512, 512), (512, 512)),
        (BUCKETS, (333, 1000), (256, 832), (277, 832)),
        (BUCKETS, (1000, 333), (832, 256), (832, 277)),
        (BUCKETS, (64, 48), (576, 448), (597, 448)),
        (NO_UPSCALE, (512, 512), (512, 512), (512, 512)),
        (NO_UPSCALE, (600, 400), (576, 384), (600, 400)),
        (NO_UPSCALE, (1920, 1080), (640, 384), (683, 384)),
        (NO_UPSCALE, (100, 100), (64, 64), (100, 100)),
        (NO_UPSCALE, (333, 1000), (256, 768), (256, 769)),
        (NO_UPSCALE, (1000, 333), (768, 256), (769, 256)),
        (NO_UPSCALE, (64, 48), (64, 0), (64, 48)),
        (SMALL, (600, 400), (80, 48), (80, 53)),
        (SMALL, (1000, 333), (104, 32), (104, 35)),
    ],
)
def test_an_image_fits_as_in_sd_scripts(rule: BucketRule, image, bucket, resized):
    assert rule.fit(image) == Fit(resized=resized, bucket=bucket)


@pytest.mark.parametrize("rule", [SQUARE, BUCKETS, SMALL], ids=["one size", "buckets", "small buckets"])
def test_the_resized_image_always_covers_its_bucket(rule: BucketRule):
    for width in range(8, 2000, 37):
        for height in range(8, 2000, 41):
            fit = rule.fit((width, height))
            assert fit.resized[0] >= fit.bucket[0] and fit.resized[1] >= fit.bucket[1], (width, height, fit)
            assert fit.resized[0] == fit.bucket[0] or fit.resized[1] == fit.bucket[1], (width, height, fit)
