"""A trial's scores by epoch, and what a training that was stopped would probably have reached. Pure.

Trials of different lengths are compared at equal fractions of their own epochs: the twelfth epoch of twelve is the end
of a schedule, the twelfth of twenty its middle. Lower scores are better.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

SMOOTHED_OVER = 2  # checkpoints; one alone is noisier than the difference between two trials
FORECAST_FROM = 4  # checkpoints that tell where a training leads


@dataclass(frozen=True)
class Curve:
    """The scores of one trial.

    Args:
        horizon: the epochs it is to train.
        points: (epoch, score) of each measured checkpoint, by epoch.
        final: the score that decides it; None as long as there is none, and for a stopped trial.
    """

    horizon: int
    points: tuple[tuple[int, float], ...]
    final: float | None = None

    @classmethod
    def of(cls, horizon: int, points: Mapping[int, float], final: float | None = None) -> Curve:
        """Return the curve of scores by epoch."""
        return cls(horizon, tuple(sorted(points.items())), final)

    @property
    def epoch(self) -> int:
        """The last measured epoch; 0 before the first."""
        return self.points[-1][0] if self.points else 0

    @property
    def fraction(self) -> float:
        """How much of its own epochs is measured, 0 to 1."""
        return min(1.0, self.epoch / self.horizon)

    @cached_property
    def smoothed(self) -> tuple[tuple[float, float], ...]:
        """(fraction, mean of the last checkpoints) of each measured checkpoint."""
        values = [value for _, value in self.points]
        means = []
        for place, (epoch, _) in enumerate(self.points):
            window = values[max(0, place + 1 - SMOOTHED_OVER) : place + 1]
            means.append((min(1.0, epoch / self.horizon), sum(window) / len(window)))
        return tuple(means)

    def at(self, fraction: float) -> float | None:
        """Return the smoothed score at a fraction, interpolated linearly; None where it was not measured."""
        known = self.smoothed
        place = bisect_left(known, fraction, key=lambda point: point[0])
        if place == len(known):
            return None
        after, value = known[place]
        if after == fraction:
            return value
        if place == 0:
            return None
        before, last = known[place - 1]
        return last + (value - last) * (fraction - before) / (after - before)


class Imputation:
    """What stopped trainings would probably have reached: the last score and the peers' median change since.

    Args:
        peers: finished trials that passed their gate.
    """

    def __init__(self, peers: Iterable[Curve]) -> None:
        self._changes = _Changes((peer, peer.final) for peer in peers if peer.final is not None)

    def end(self, curve: Curve) -> float | None:
        """Return what a stopped trial would have reached; None where it has no score."""
        if not curve.points:
            return None
        fraction, last = curve.smoothed[-1]
        return last + self._changes.since(fraction)


def imputed(curve: Curve, peers: Iterable[Curve]) -> float | None:
    """Return what one stopped training would probably have reached; see `Imputation`."""
    return Imputation(peers).end(curve)


class Forecast:
    """What trainings would reach on average, for models: less noisy than a last score or an imputed end.

    Each of the last checkpoints tells it with noise of its own: its score and the peers' median change from there to
    their smoothed ends. The forecast is the mean of what they tell.

    Args:
        peers: finished trials that passed their gate.
    """

    def __init__(self, peers: Iterable[Curve]) -> None:
        finished = (peer for peer in peers if peer.final is not None and peer.points)
        self._changes = _Changes((peer, peer.smoothed[-1][1]) for peer in finished)

    def end(self, curve: Curve) -> float | None:
        """Return the forecast of a finished or a stopped trial; None where it has no score."""
        last = curve.points[-FORECAST_FROM:]
        if not last:
            return None
        return statistics.fmean(score + self._changes.since(min(1.0, epoch / curve.horizon)) for epoch, score in last)


class _Changes:
    """By how much trainings changed from a fraction of them to their ends, as (curve, end) says: the median."""

    def __init__(self, ends: Iterable[tuple[Curve, float]]) -> None:
        self._ends = list(ends)
        self._known: dict[float, float] = {}  # by fraction: trials share a few

    def since(self, fraction: float) -> float:
        """Return the median change; 0 where nothing is known of that fraction."""
        if fraction not in self._known:
            changes = [end - then for curve, end in self._ends if (then := curve.at(fraction)) is not None]
            self._known[fraction] = statistics.median(changes) if changes else 0.0
        return self._known[fraction]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of `values` lies, interpolated linearly; share 0.5 is the median."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
