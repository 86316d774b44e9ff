"""Fronts, knees and hypervolumes against references that look at every pair, every line and every cell."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer_daemon.optuna_adapter.hypervolume import hypervolume
from optimizer_daemon.search.pareto import front_of, fronts, knee_distances, reference_point

COORDINATE = st.integers(0, 6).map(float)  # small, so that ties and equal points come up
NO_DEADLINE = settings(deadline=None, derandomize=True)


def points(fewest: int = 0):
    return st.integers(2, 3).flatmap(
        lambda size: st.lists(st.tuples(*[COORDINATE] * size), min_size=fewest, max_size=12)
    )


def dominates(one, other) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


@given(points())
@NO_DEADLINE
def test_the_front_is_what_nothing_dominates(known):
    assert front_of(known) == [
        place for place, point in enumerate(known) if not any(dominates(other, point) for other in known)
    ]


@given(points())
@NO_DEADLINE
def test_fronts_take_every_point_once_and_each_is_dominated_by_one_of_the_front_before(known):
    layers = list(fronts(known))
    assert sorted(place for layer in layers for place in layer) == list(range(len(known)))
    for before, layer in pairwise(layers):
        for place in layer:
            assert any(dominates(known[other], known[place]) for other in before)


@given(points(fewest=1))
@NO_DEADLINE
def test_the_hypervolume_is_the_count_of_the_unit_cells_that_a_point_dominates(known):
    corner = (7.0,) * len(known[0])
    cells = sum(
        any(all(a <= b for a, b in zip(point, cell, strict=True)) for point in known)
        for cell in product(range(7), repeat=len(corner))
    )
    front = [known[place] for place in front_of(known)]
    assert hypervolume(known, corner) == pytest.approx(cells)
    assert hypervolume(front, corner) == pytest.approx(cells)


def test_nothing_has_no_volume():
    assert hypervolume([], ()) == 0.0


@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=2, max_size=12))
@NO_DEADLINE
def test_with_two_objectives_the_distance_is_that_to_the_line_between_the_extremes(known):
    front = [known[place] for place in front_of(known)]
    (left, right) = min(front), min(front, key=lambda point: (point[1], point[0]))
    if left == right:
        assert knee_distances(front) == [0.0] * len(front)
        return
    width, height = right[0] - left[0], left[1] - right[1]
    for point, distance in zip(front, knee_distances(front), strict=True):
        x, y = (point[0] - left[0]) / width, (point[1] - right[1]) / height
        # |cross product| of the line's direction (1, -1) with the point seen from (0, 1); positive before the line
        assert distance == pytest.approx((1.0 - x - y) / math.sqrt(2))


@given(points(fewest=1), st.floats(0.01, 100), st.floats(-50, 50))
@NO_DEADLINE
def test_the_unit_of_an_objective_does_not_matter_to_the_knee(known, scale, shift):
    front = [known[place] for place in front_of(known)]
    other = [(scale * first + shift, *rest) for first, *rest in front]
    assert knee_distances(other) == pytest.approx(knee_distances(front), abs=1e-6)


@pytest.mark.parametrize(
    ("front", "distances"),
    [
        pytest.param([], [], id="no front"),
        pytest.param([(3.0, 4.0)], [0.0], id="one member"),
        pytest.param([(0.0, 1.0), (1.0, 0.0)], [0.0, 0.0], id="two extremes"),
        pytest.param([(0.0, 2.0), (0.2, 0.4), (1.0, 0.0)], [0.0, 0.6 / math.sqrt(2), 0.0], id="a bend"),
        pytest.param([(0.0, 1.0, 5.0), (1.0, 0.0, 5.0)], [0.0, 0.0], id="an objective in which all are equal"),
        pytest.param(
            [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (0.2, 0.2, 0.2)],
            [-1 / math.sqrt(3)] * 3 + [0.4 / math.sqrt(3)],
            id="three objectives",
        ),
    ],
)
def test_how_far_each_member_lies_before_the_plane(front, distances):
    assert knee_distances(front) == pytest.approx(distances)


@given(points(fewest=1))
@NO_DEADLINE
def test_no_point_is_worse_than_the_reference(known):
    corner = reference_point(known)
    assert all(a <= b for point in known for a, b in zip(point, corner, strict=True))
    for place, axis in enumerate(zip(*known, strict=True)):
        assert corner[place] - max(axis) == pytest.approx(0.1 * (max(axis) - min(axis)))
