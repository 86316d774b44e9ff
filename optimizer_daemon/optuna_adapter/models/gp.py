"""A Gaussian process that looks for its best point among feasible ones."""

from __future__ import annotations

import itertools
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.samplers import GPSampler

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.search.expressions import Value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from optuna._gp.acqf import BaseAcquisitionFunc
    from optuna._gp.search_space import SearchSpace

    Array = NDArray[np.float64]

MOST_TRIALS = 200  # the cost grows with the third power of the trials: 5 s an ask at 1,000


class Gp:
    """Expected improvement under a Gaussian process."""

    start_up_trials = 10
    objectives = 1_000

    def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict[str, Value]:
        """Draw the feasible configuration with the greatest expected improvement that a search finds."""
        sampler = FeasibleGp(space, seed)
        known = history.of(space.wide).newest(MOST_TRIALS).evenly_constrained()
        return space.completed(sampler.sample_relative(known, known.asking, space.wide))


class FeasibleGp(GPSampler):
    """Searches a wide pool of points first, then by short moves from the best feasible ones of them.

    Rules are looked at last: a thousand points' gains cost less than the rules of ten.
    """

    _POOL = 1_024
    _CHECKS = 128  # of the pool's best against the rules
    _STARTS = 5
    _DRAWN = 128  # feasible points, where the pool had too few: a space that the rules leave nearly empty
    _MOVES = 48
    _MOVE_CHECKS = 4  # of one start's moves against the rules
    _WIDTHS = (0.2, 0.1, 0.05, 0.02)

    def __init__(self, space: FeasibleSpace, seed: int) -> None:
        super().__init__(seed=seed, n_startup_trials=0)
        self._feasible = space
        self._prior = Random(seed)

    def _optimize_acqf(self, acqf: BaseAcquisitionFunc, best_params: Array | None) -> Array:
        """Return the best point found, normalised as the acquisition function takes it, (dimensions,)."""
        scale = acqf.search_space
        points = self._starts(acqf, best_params)
        gains = acqf.eval_acqf_no_grad(points)
        for width in self._WIDTHS:
            moves = self._moved(scale, points, width)
            found = acqf.eval_acqf_no_grad(moves.reshape(-1, scale.dim)).reshape(moves.shape[:2])
            for place, row in enumerate(found):
                better = [move for move in np.argsort(-row, kind="stable") if row[move] > gains[place]]
                for move in self._allowed(scale, moves[place], better[: self._MOVE_CHECKS]):
                    points[place], gains[place] = moves[place, move], row[move]
                    break
        winner: Array = points[int(np.argmax(gains))]
        return winner

    def _starts(self, acqf: BaseAcquisitionFunc, best_params: Array | None) -> Array:
        """Return the best feasible points of the pool, (starts, dimensions)."""
        scale = acqf.search_space
        pool = self._snapped(scale, self._rng.rng.uniform(size=(self._POOL, scale.dim)))
        if best_params is not None:  # of trials that were run, but maybe in a stage that draws elsewhere
            pool = np.concatenate([best_params, pool])
        ranked = np.argsort(-acqf.eval_acqf_no_grad(pool), kind="stable")[: self._CHECKS].tolist()
        best = list(itertools.islice(self._allowed(scale, pool, ranked), self._STARTS))
        if len(best) == self._STARTS:
            return pool[best]
        drawn = [self._feasible.draw(self._prior) for _ in range(self._DRAWN)]
        trials: list[Any] = list(drawn)  # it only counts them when the parameters are given
        sure = np.concatenate([pool[best], scale.get_normalized_params(trials, drawn)])
        gains = acqf.eval_acqf_no_grad(sure)
        return sure[np.argsort(-gains, kind="stable")[: self._STARTS]]

    def _moved(self, scale: SearchSpace, points: Array, width: float) -> Array:
        """Return neighbours of each point, one or two coordinates changed: (points, moves, dimensions)."""
        rng = self._rng.rng
        shape = (len(points), self._MOVES, scale.dim)
        changed = rng.uniform(size=shape).argsort(axis=-1) < rng.randint(1, 3, size=(*shape[:2], 1))
        moved = np.where(
            scale.is_categorical, rng.uniform(size=shape), points[:, None, :] + rng.normal(0.0, width, size=shape)
        )
        return np.where(changed, self._snapped(scale, np.clip(moved, 0.0, 1.0)), points[:, None, :])

    @staticmethod
    def _snapped(scale: SearchSpace, points: Array) -> Array:
        """Return points of the unit cube moved to what can be drawn: choices by equal parts, numbers to their grids."""
        snapped = points.copy()
        for place, known in zip(scale.discrete_indices, scale.get_choices_of_discrete_params(), strict=True):
            if scale.is_categorical[place]:
                snapped[..., place] = known[np.minimum((points[..., place] * len(known)).astype(int), len(known) - 1)]
            else:
                snapped[..., place] = known[np.abs(points[..., place, None] - known).argmin(axis=-1)]
        return snapped

    def _allowed(self, scale: SearchSpace, points: Array, places: list[int]) -> Iterator[int]:
        return (place for place in places if self._is_feasible(scale, points[place]))

    def _is_feasible(self, scale: SearchSpace, point: Array) -> bool:
        return self._feasible.is_feasible(self._feasible.on_grid(scale.get_unnormalized_param(point)))


MODEL = Gp()
