"""Curves of different lengths at equal fractions, imputed ends, and whom the pruner stops."""

from __future__ import annotations

import statistics
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer_daemon.search.curves import Curve, Forecast, imputed, quantile
from optimizer_daemon.search.pruning import LEAST_PEERS, Pruner


def falling(horizon: int, final: float, slope: float = 1.0) -> Curve:
    """A curve that falls by `slope` in all to `final`, measured every second epoch."""
    points = {epoch: final + slope * (1 - epoch / horizon) for epoch in range(2, horizon + 1, 2)}
    return Curve.of(horizon, points, final)


def cut(curve: Curve, epoch: int) -> Curve:
    return Curve.of(curve.horizon, {known: value for known, value in curve.points if known <= epoch})


def test_a_checkpoint_counts_with_the_one_before_it():
    curve = Curve.of(8, {2: 1.0, 4: 0.5, 8: 0.2})
    assert curve.smoothed == ((0.25, 1.0), (0.5, 0.75), (1.0, pytest.approx(0.35)))


def test_between_two_checkpoints_the_line_and_outside_of_them_nothing():
    curve = Curve.of(8, {2: 1.0, 4: 0.5})
    assert curve.at(0.25) == 1.0
    assert curve.at(0.375) == pytest.approx(0.875)
    assert curve.at(0.2) is None
    assert curve.at(0.6) is None
    assert Curve.of(8, {}).at(0.5) is None


def test_the_same_course_over_12_and_20_epochs_is_the_same_at_every_fraction():
    short, long = falling(12, 0.2), falling(20, 0.2)
    for fraction in (0.5, 0.75, 1.0):
        # but for the smoothing, which reaches back by another part of the training
        assert short.at(fraction) == pytest.approx(long.at(fraction) + 1 / 12 - 1 / 20)


def test_a_stopped_training_goes_on_as_its_peers_did():
    peers = [falling(12, 0.2), falling(20, 0.5), falling(16, 0.9)]
    stopped = cut(falling(12, 0.4), 6)
    changes = [peer.final - peer.at(0.5) for peer in peers]
    assert imputed(stopped, peers) == pytest.approx(stopped.smoothed[-1][1] + statistics.median(changes))
    assert imputed(stopped, peers) == pytest.approx(0.4, abs=0.06)


def test_without_peers_it_stays_where_it_was_and_without_scores_nothing_is_known():
    assert imputed(Curve.of(8, {2: 1.0, 4: 0.5}), []) == 0.75
    assert imputed(Curve.of(8, {}), [falling(8, 0.1)]) is None
    unfinished = [cut(falling(8, 0.1), 4)]
    assert imputed(Curve.of(8, {2: 1.0}), unfinished) == 1.0


def test_a_forecast_is_what_the_last_four_checkpoints_tell_on_average():
    peers = [falling(12, 0.2), falling(12, 0.5)]
    noisy = Curve.of(12, {2: 9.0, 4: 9.0, 6: 0.5 + 0.1, 8: 1 / 3 - 0.1, 10: 1 / 6 + 0.1, 12: 0.0 - 0.3}, -0.3)
    # to their smoothed ends peers fall by 0.5, 0.333, 0.167 from half on, and their middles are smoothed as well
    exact = [0.6 - 0.5, 1 / 3 - 0.1 - 1 / 3, 1 / 6 + 0.1 - 1 / 6, -0.3]
    assert Forecast(peers).end(noisy) == pytest.approx(statistics.fmean(exact))


def test_a_forecast_scatters_less_than_a_last_score():
    rng = Random(1)
    curves = []
    for _ in range(40):
        points = {epoch: value + rng.gauss(0.0, 0.1) for epoch, value in falling(16, 0.2).points}
        curves.append(Curve.of(16, points, points[16]))
    forecast = Forecast(curves)
    ends = [forecast.end(curve) for curve in curves]
    assert statistics.stdev(ends) < 0.7 * statistics.stdev(curve.final for curve in curves)
    assert statistics.fmean(ends) == pytest.approx(0.2, abs=0.1)


def test_a_forecast_of_a_stopped_training_is_of_its_end_and_of_no_scores_there_is_none():
    peers = [falling(12, 0.2), falling(20, 0.5), falling(16, 0.9)]
    assert Forecast(peers).end(cut(falling(12, 0.4), 6)) == pytest.approx(0.4, abs=0.15)
    assert Forecast([]).end(Curve.of(8, {2: 1.0, 4: 0.5})) == 0.75
    assert Forecast(peers).end(Curve.of(8, {})) is None


@settings(deadline=None)  # the first call imports numpy
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_numpy_s(values, share):
    numpy = pytest.importorskip("numpy")
    assert quantile(values, share) == pytest.approx(float(numpy.quantile(values, share)), rel=1e-9, abs=1e-6)


PEERS = [falling(12, 0.1 * number) for number in range(1, 9)]  # at the middle: 0.1 .. 0.8, and 0.583 more


def at_middle(final: float) -> Curve:
    return cut(falling(12, final), 6)


@pytest.mark.parametrize(
    ("name", "final", "stopped"),
    [
        ("median", 0.44, False),
        ("median", 0.46, True),
        ("percentile", 0.46, False),
        ("percentile", 0.62, False),
        ("percentile", 0.63, True),
        ("none", 5.0, False),
    ],
)
def test_what_is_worse_than_half_or_three_quarters_of_its_peers_is_stopped(name, final, stopped):
    assert (Pruner(name).objection(at_middle(final), PEERS) is not None) == stopped


def test_the_reason_says_what_was_compared():
    reason = Pruner("median").objection(at_middle(0.8), PEERS)
    assert reason == (
        "worse than the median of its peers at 50% of the training: 1.38333 at epoch 6, theirs 1.03333 (8 trials)"
    )


def test_nothing_is_stopped_before_the_warm_up_nor_at_the_end():
    bad = falling(12, 5.0)
    assert Pruner("median").objection(cut(bad, 2), PEERS) is None
    assert Pruner("median", warmup_epochs=2).objection(cut(bad, 2), PEERS) is not None
    assert Pruner("median").objection(cut(bad, 4), PEERS) is not None
    assert Pruner("median").objection(bad, PEERS) is None
    assert Pruner("median").objection(Curve.of(12, {}), PEERS) is None


def test_five_measured_peers_are_the_least_and_stopped_ones_count_to_their_last_score():
    bad = at_middle(5.0)
    few = PEERS[: LEAST_PEERS - 1]
    assert Pruner("median").objection(bad, few) is None
    assert Pruner("median").objection(bad, [*few, at_middle(0.9)]) is None, "a stopped one is not measured"
    assert Pruner("median").objection(bad, PEERS[:LEAST_PEERS]) is not None
    # one that was stopped earlier than the middle says nothing about it
    early = [cut(peer, 4) for peer in PEERS]
    assert Pruner("median").objection(bad, [*PEERS[:LEAST_PEERS], *early]) == Pruner("median").objection(
        bad, PEERS[:LEAST_PEERS]
    )


def test_the_best_two_so_far_are_never_stopped():
    """A score that would be second of all at the end is safe, whatever others had at this point."""
    others = [Curve.of(12, {2: 0.1, 4: 0.1, 6: 0.1, 12: 0.9}, 0.9) for _ in range(6)]
    leader = Curve.of(12, {2: 0.5, 4: 0.5, 6: 0.5})
    assert Pruner("median").objection(leader, others) is None
    better = [Curve.of(12, {2: 0.1, 4: 0.1, 6: 0.1, 12: 0.2}, 0.2) for _ in range(2)]
    assert Pruner("median").objection(leader, [*others, *better]) is not None
