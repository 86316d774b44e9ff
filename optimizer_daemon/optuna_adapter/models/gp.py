"""A Gaussian process that looks for its best point among feasible ones."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.samplers import GPSampler

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.search.expressions import Value

if TYPE_CHECKING:
    from optuna._gp.acqf import BaseAcquisitionFunc

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
    """Searches a wide pool of feasible points first, then by short moves from the best of them."""

    _POOL = 512
    _STARTS = 8
    _MOVES = 24
    _WIDTHS = (0.2, 0.1, 0.05, 0.02, 0.01)

    def __init__(self, space: FeasibleSpace, seed: int) -> None:
        super().__init__(seed=seed, n_startup_trials=0)
        self._feasible = space
        self._prior = Random(seed)

    def _optimize_acqf(self, acqf: BaseAcquisitionFunc, best_params: np.ndarray | None) -> np.ndarray:
        """Return the best point found, normalised as the acquisition function takes it, (dimensions,)."""
        scale = acqf.search_space
        pool = self._normalised(acqf, [self._feasible.draw(self._prior) for _ in range(self._POOL)])
        if best_params is not None:
            # Of trials that were run, but maybe in a stage that draws elsewhere.
            inside = [point for point in best_params if self._feasible.is_feasible(self._values(acqf, point))]
            pool = np.concatenate([pool, *(point[None] for point in inside)])
        gains = acqf.eval_acqf_no_grad(pool)
        best = np.argsort(-gains, kind="stable")[: self._STARTS]
        points, gains = pool[best], gains[best]
        for width in self._WIDTHS:
            moves = np.stack([self._moved(acqf, point, width) for point in points])  # starts x moves x dimensions
            found = acqf.eval_acqf_no_grad(moves.reshape(-1, scale.dim)).reshape(len(points), -1)
            for place, chosen in enumerate(found.argmax(axis=1)):
                if found[place, chosen] > gains[place]:
                    points[place], gains[place] = moves[place, chosen], found[place, chosen]
        winner: np.ndarray = points[int(np.argmax(gains))]
        return winner

    def _moved(self, acqf: BaseAcquisitionFunc, point: np.ndarray, width: float) -> np.ndarray:
        """Return feasible points around one, one or two coordinates changed; the point itself where there are none."""
        scale, rng = acqf.search_space, self._rng.rng
        found = []
        for _ in range(4 * self._MOVES):
            moved = point.copy()
            for place in rng.choice(scale.dim, size=rng.randint(1, 3)):
                if scale.is_categorical[place]:
                    moved[place] = rng.randint(int(scale._bounds[place, 1]))
                else:
                    moved[place] = np.clip(moved[place] + rng.normal(0.0, width), 0.0, 1.0)
            values = self._feasible.completed(self._values(acqf, moved))
            if self._feasible.space.is_feasible(values):
                found.append(values)
            if len(found) == self._MOVES:
                break
        near = self._normalised(acqf, found) if found else np.empty((0, scale.dim))
        return np.concatenate([near, np.tile(point, (self._MOVES - len(found), 1))])

    def _values(self, acqf: BaseAcquisitionFunc, point: np.ndarray) -> dict[str, Any]:
        return self._feasible.on_grid(acqf.search_space.get_unnormalized_param(point))

    @staticmethod
    def _normalised(acqf: BaseAcquisitionFunc, values: list[dict[str, Value]]) -> np.ndarray:
        trials: list[Any] = list(values)  # it only counts them when the parameters are given
        return acqf.search_space.get_normalized_params(trials, values)


MODEL = Gp()
