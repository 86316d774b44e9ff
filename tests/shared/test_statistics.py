"""Tie sets, certainties and intervals keep what they promise, in simulated studies with fixed seeds."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

import numpy as np
import pytest

from benchmarks.evaluation.statistics import (
    bootstrap_coverage,
    calibration,
    jackknife_coverage,
    paired_coverage,
    tie_sets,
    winners,
)
from shared.scores.statistics import difference, pseudo_values, rank


@pytest.mark.parametrize(("pictures", "largest"), [(8, 3.0), (16, 2.0), (32, 1.6)])
def test_the_tie_set_holds_the_true_best_and_stays_small_and_the_certainty_is_as_often_right_as_it_says(
    pictures, largest
):
    found = tie_sets("spread", pictures, 2000, seed=pictures)
    assert found["coverage"] >= 0.95
    assert found["size"] <= largest
    for row in calibration(found["sure"]):
        error = math.sqrt(row["said"] * (1 - row["said"]) / row["studies"])
        assert row["right"] == pytest.approx(row["said"], abs=3 * error + 0.03)


@pytest.mark.parametrize(
    ("kind", "unequal"),
    [
        pytest.param("equal", 1.0, id="all alike, the hardest case"),
        pytest.param("close", 1.0, id="neighbours .0022 apart"),
        pytest.param("equal", 3.0, id="all alike, three of them three times as noisy"),
    ],
)
def test_no_study_makes_the_tie_set_lose_the_best_more_often_than_it_says(kind, unequal):
    found = tie_sets(kind, 16, 500, seed=1, unequal=unequal)
    assert found["coverage"] >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 500)
    assert (found["pooled"] > 0.95) == (unequal == 1), "variances that differ are noticed"


@pytest.mark.parametrize(("pictures", "common"), [(8, 0.52), (16, 0.63), (32, 0.74)])
def test_common_seeds_find_the_right_winner_about_twice_as_often(pictures, common):
    found = winners(pictures, 3000, seed=2)
    assert found["common"] == pytest.approx(common, abs=0.03)
    if pictures == 8:
        assert found["own"] == pytest.approx(0.27, abs=0.03)


def test_the_paired_interval_covers_as_said_and_the_bootstrap_less():
    assert paired_coverage(8, 3000, seed=3) == pytest.approx(0.949, abs=0.012)
    assert bootstrap_coverage(8, 1500, seed=3, draws=400) == pytest.approx(0.885, abs=0.025)


def test_the_interval_of_a_combined_score_covers_nearly_as_said_away_from_the_target():
    assert jackknife_coverage(16, 600, seed=4, off_target=0.05) >= 0.92


def test_pseudo_values_of_a_mean_are_the_values_themselves():
    values = [0.1, 0.4, 0.35, 0.9]
    assert pseudo_values(lambda indices: fmean(values[i] for i in indices), 4) == pytest.approx(values)


def test_pseudo_values_of_a_spread_give_the_known_error():
    # the jackknife's variance of an average of squares equals the textbook one
    values = np.random.default_rng(0).normal(0, 1, 400)
    pseudo = pseudo_values(lambda indices: pstdev(values[list(indices)]), 400)
    assert np.std(pseudo, ddof=1) / 20 == pytest.approx(1 / math.sqrt(800), rel=0.15)
    with pytest.raises(ValueError, match="at least 2"):
        pseudo_values(fmean, 1)


def test_the_difference_is_centred_on_the_scores_and_as_wide_as_the_pairs_say():
    plain = difference([1.0, 2.0, 3.0], [0.5, 1.0, 3.0])
    moved = difference([1.0, 2.0, 3.0], [0.5, 1.0, 3.0], estimate=2.0)
    assert (plain.mean, moved.mean) == (0.5, 2.0)
    assert moved.high - moved.low == pytest.approx(plain.high - plain.low)


TABLE = np.array([[0.30, 0.32, 0.28, 0.31], [0.10, 0.13, 0.08, 0.10], [0.11, 0.12, 0.085, 0.10]])


def test_a_ranking_names_the_best_its_ties_and_the_differences():
    ranking = rank(TABLE)
    assert (ranking.best, ranking.tied) == (1, (1, 2))
    assert ranking.to_best[0].low > 0
    assert ranking.to_best[2].low < 0 < ranking.to_best[2].high
    assert ranking.certainty == ranking.shares[1]
    assert sum(ranking.shares) == pytest.approx(1)


def test_where_more_is_better_the_highest_wins_and_differences_are_negative():
    ranking = rank(TABLE, minimise=False)
    assert (ranking.best, ranking.tied) == (0, (0,))
    assert ranking.to_best[1].high < 0
    assert ranking.certainty > 0.99


def test_the_recorded_scores_decide_the_order_where_they_are_given():
    assert rank(TABLE, scores=[0.3, 0.2, 0.1]).best == 2


@pytest.mark.parametrize(
    ("table", "tied", "certainty"),
    [
        pytest.param([[0.1, 0.2]], (0,), 1.0, id="one checkpoint"),
        pytest.param([[0.1], [0.2]], (0, 1), None, id="one picture says nothing"),
        pytest.param([[0.1, 0.2], [0.1, 0.2]], (0, 1), 0.5, id="equal content"),
        pytest.param([[0.1, 0.2], [0.2, 0.3]], (0,), 1.0, id="a difference without any noise"),
        pytest.param([[0.1, 0.3, 0.2], [0.1, 0.3, 0.2], [0.9, 0.8, 0.9]], (0, 1), None, id="twins ahead of another"),
    ],
)
def test_ends_of_the_range(table, tied, certainty):
    ranking = rank(np.array(table))
    assert ranking.tied == tied
    if len(table) < 3:
        assert ranking.certainty == (None if certainty is None else pytest.approx(certainty, abs=0.01))


def test_an_empty_table_is_an_error():
    with pytest.raises(ValueError, match="0 x 4"):
        rank(np.empty((0, 4)))
