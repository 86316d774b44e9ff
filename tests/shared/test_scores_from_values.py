"""Scores as pure functions of per-picture values: missing metrics, subsets of pictures."""

from __future__ import annotations

import random
from itertools import combinations
from statistics import fmean, pstdev

import pytest

from shared.scores.formulas import mean_over
from shared.scores.from_values import scores_from_values
from shared.scoring_presets import frozen_preset, load_preset

RNG = random.Random(3)
VALUES = {
    name: [RNG.uniform(0.2, 0.8) for _ in range(6)]
    for name in ("brightness", "contrast", "saturation", "lpips_diversity", "clip_consistency")
}


def without(*names: str) -> dict[str, list[float]]:
    return {name: values for name, values in VALUES.items() if name not in names}


def combined(subset: list[int]) -> float:
    light = [VALUES["brightness"][i] for i in subset]
    contrast = [VALUES["contrast"][i] for i in subset]
    return abs(fmean(light) - 0.5) + 0.5 * pstdev(light) + abs(fmean(contrast) - 0.2) + 0.5 * pstdev(contrast)


def test_the_later_scripts_score_beside_the_first_ones():
    scores = scores_from_values(VALUES, frozen_preset(load_preset("lpips_clip")))
    expected = (
        0.40 * combined([*range(6)])
        + 0.30 * abs(fmean(VALUES["lpips_diversity"]) - 0.40)
        + 0.30 * max(0.0, 0.35 - fmean(VALUES["clip_consistency"]))
    )
    assert scores["lpips_clip_score"].value == pytest.approx(expected)
    assert scores["lpips_clip_score"].left_out == ()
    assert scores["combined_score"].value == pytest.approx(combined([*range(6)]))


def test_a_missing_optional_metric_gives_its_weight_to_the_others_and_is_named():
    score = scores_from_values(without("lpips_diversity"), frozen_preset(load_preset("lpips_clip")))["lpips_clip_score"]
    expected = 0.40 * combined([*range(6)]) + 0.30 * max(0.0, 0.35 - fmean(VALUES["clip_consistency"]))
    assert score.value == pytest.approx(expected / 0.70)
    assert score.left_out == ("lpips_diversity",)


def test_a_missing_required_metric_leaves_no_score_and_is_named():
    scores = scores_from_values(VALUES, frozen_preset(load_preset("recommended")))
    assert scores["recommended_score"].value is None
    assert scores["recommended_score"].left_out == ("prompt_match", "style_distance")
    assert scores["combined_score"].value is not None


def test_a_subset_of_the_pictures_scores_as_if_there_were_no_others():
    scoring = frozen_preset(load_preset("combined"))
    assert scores_from_values(VALUES, scoring, [0, 2, 5])["combined_score"].value == pytest.approx(combined([0, 2, 5]))


def test_a_mean_over_pairs_is_exact_with_one_picture_left_out():
    points = [RNG.uniform(0, 1) for _ in range(7)]
    distance = [[abs(a - b) for b in points] for a in points]
    per_picture = [sum(row) / 6 for row in distance]
    for left_out in range(7):
        others = [i for i in range(7) if i != left_out]
        exact = fmean(distance[a][b] for a, b in combinations(others, 2))
        assert mean_over(per_picture, others, pairwise=True) == pytest.approx(exact)
    assert mean_over(per_picture, pairwise=True) == pytest.approx(
        fmean(distance[a][b] for a, b in combinations(range(7), 2))
    )
