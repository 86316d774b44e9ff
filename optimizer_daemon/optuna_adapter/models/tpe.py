"""The tree-structured Parzen estimator, restricted to what no rule forbids."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import numpy as np
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.search.expressions import Value


class Tpe:
    """Draws over the joint space; the candidates that it compares are feasible ones."""

    start_up_trials = 10
    objectives = 1_000

    def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict[str, Value]:
        """Draw the feasible candidate with the best ratio of good to bad density; what runs counts as bad."""
        sampler = TPESampler(n_startup_trials=0, multivariate=True, seed=seed)
        estimator: Any = functools.partial(FeasibleParzenEstimator, space, Random(seed))
        sampler._parzen_estimator_cls = estimator
        known = history.of(space.wide)
        return space.completed(sampler.sample_relative(known, known.asking, space.wide))


class FeasibleParzenEstimator(_ParzenEstimator):
    """Yields feasible candidates only: the restriction scales both densities alike, so their ratio stays."""

    _ROUNDS = 8

    def __init__(self, space: FeasibleSpace, rng: Random, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._feasible = space
        self._prior = rng

    def sample(self, rng: np.random.RandomState, size: int) -> dict[str, np.ndarray]:
        """Return `size` feasible candidates in Optuna's internal form, by name; the prior fills up what is missing."""
        wide = self._feasible.wide
        kept: list[list[float]] = []
        for _ in range(self._ROUNDS):
            sampled = super().sample(rng, size)
            for row in zip(*(sampled[name].tolist() for name in wide), strict=True):
                values = {name: known.to_external_repr(x) for (name, known), x in zip(wide.items(), row, strict=True)}
                if self._feasible.is_feasible(values):
                    kept.append(list(row))
            if len(kept) >= size:
                break
        while len(kept) < size:
            drawn = self._feasible.draw(self._prior)
            kept.append([known.to_internal_repr(drawn[name]) for name, known in wide.items()])
        return {name: np.array([row[place] for row in kept[:size]]) for place, name in enumerate(wide)}


MODEL = Tpe()
