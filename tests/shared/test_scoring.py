"""The arithmetic of scores, intervals and the gate."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest

from shared.scores.formulas import combined_score, gate, paired_interval, pixar_style_score, share_in_range


def test_combined_score_is_the_documented_formula():
    score = combined_score([0.4, 0.5], [0.20, 0.24])
    assert score.brightness_score == pytest.approx(abs(0.45 - 0.50) + 0.5 * 0.05)
    assert score.contrast_score == pytest.approx(abs(0.22 - 0.20) + 0.5 * 0.02)
    assert score.combined_score == pytest.approx(score.brightness_score + score.contrast_score)


def test_a_set_on_target_without_spread_scores_zero():
    assert combined_score([0.5] * 4, [0.2] * 4).combined_score == pytest.approx(0)


@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "expected"),
    [
        pytest.param([0.5, 0.5], [0.2, 0.2], [0.4, 0.4], 1.0, id="everything in range and alike"),
        pytest.param([0.9, 0.9], [0.2, 0.2], [0.4, 0.4], 0.7, id="too bright"),
        pytest.param([0.5, 0.5], [0.4, 0.4], [0.4, 0.4], 0.6, id="too contrasty"),
        pytest.param([0.5, 0.5], [0.2, 0.2], [0.9, 0.9], 0.8, id="too colourful"),
        pytest.param([0.4, 0.6], [0.15, 0.25], [0.4, 0.4], 0.9, id="in range but inconsistent"),
    ],
)
def test_pixar_style_score_weighs_its_four_parts(brightness, contrast, saturation, expected):
    assert pixar_style_score(brightness, contrast, saturation) == pytest.approx(expected)


def test_a_range_includes_its_ends():
    assert share_in_range([0.4, 0.6, 0.39, 0.61], (0.4, 0.6)) == 0.5


def test_the_paired_interval_matches_a_published_table():
    # Student's t for 7 degrees of freedom, 97.5 %: 2.3646
    differences = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    interval = paired_interval(differences)
    half = 2.3646 * math.sqrt(6.0) / math.sqrt(8)
    assert (interval.mean, interval.low) == (4.5, pytest.approx(4.5 - half, abs=1e-3))


def test_the_paired_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(1)
    covered = 0
    for _ in range(3000):
        interval = paired_interval([rng.gauss(0.1, 1) for _ in range(8)])
        covered += interval.low <= 0.1 <= interval.high
    assert covered / 3000 == pytest.approx(0.95, abs=0.013)


def test_one_pair_proves_nothing_and_no_pair_is_an_error():
    assert paired_interval([0.3]).high == math.inf
    with pytest.raises(ValueError, match="at least one"):
        paired_interval([])


BASE = [0.80, 0.78, 0.82, 0.79, 0.81, 0.80, 0.77, 0.83]


@pytest.mark.parametrize(
    ("clip", "passes"),
    [
        pytest.param(BASE, True, id="like the base model"),
        pytest.param([b + 0.1 for b in BASE], True, id="better than the base model"),
        pytest.param([b - 0.015 for b in BASE], True, id="worse, within the tolerance"),
        pytest.param([b - 0.03 for b in BASE], False, id="surely worse than the tolerance"),
        pytest.param([0.1, 0.9, 0.2, 0.85, 0.7, 0.9, 0.9, 0.6], True, id="worse on average but uncertain"),
    ],
)
def test_the_gate_refuses_only_a_sure_loss_of_clip_consistency(clip, passes):
    verdict = gate([None] * 8, clip, BASE)
    assert verdict.passed is passes
    assert verdict.clip_difference.mean == pytest.approx(fmean(clip) - fmean(BASE))
    assert passes or "CLIP consistency fell" in verdict.reasons[0]


def test_a_sentinel_fails_the_gate_and_names_the_image():
    assert gate([None, "black"]).reasons == ("image 1 is black",)


def test_without_clip_only_the_sentinels_decide():
    assert gate([None] * 8).passed
    assert gate([None] * 8).clip_difference is None
