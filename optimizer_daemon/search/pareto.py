"""Trade-offs between several objectives: fronts, their knee, the corner a hypervolume is measured from. Pure.

A point is a tuple with one number for each objective, lower is better. One point dominates another if it is nowhere
worse and somewhere better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Point = tuple[float, ...]

MARGIN = 0.1  # of each objective's spread, so that the ends of a front count too


def front_of(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other one dominates, in their order; equal points stay together."""
    members: list[int] = []
    # Behind whatever could dominate it: then only those before it have to be asked.
    for place in sorted(range(len(points)), key=points.__getitem__):
        point = points[place]
        if not any(_dominates(points[member], point) for member in members):
            members.append(place)
    return sorted(members)


def fronts(points: Sequence[Point]) -> Iterator[list[int]]:
    """Yield the front, then the front of what is left, and so on: indices in their order."""
    left = list(range(len(points)))
    while left:
        front = {left[place] for place in front_of([points[index] for index in left])}
        yield sorted(front)
        left = [index for index in left if index not in front]


def _dominates(one: Point, other: Point) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def knee_distances(front: Sequence[Point]) -> list[float]:
    """Return how far each point of a front lies before the plane through the ends of the axes; the knee lies farthest.

    Every objective is scaled over the front, 0 at its best and 1 at its worst value there. With two objectives the
    plane is the line between the front's two extremes. An objective in which all are equal counts for nothing.
    """
    if not front:
        return []
    lows = [min(axis) for axis in zip(*front, strict=True)]
    spans = [max(axis) - low for axis, low in zip(zip(*front, strict=True), lows, strict=True)]
    wide = sum(span > 0 for span in spans)
    distances = []
    for point in front:
        scaled = [(value - low) / span for value, low, span in zip(point, lows, spans, strict=True) if span > 0]
        distances.append((1.0 - math.fsum(scaled)) / math.sqrt(wide) if wide else 0.0)
    return distances


def reference_point(points: Sequence[Point]) -> Point:
    """Return the corner that hypervolumes are measured from: the worst of each objective and a tenth of its spread."""
    axes = list(zip(*points, strict=True))
    return tuple(max(axis) + MARGIN * (max(axis) - min(axis)) for axis in axes)
