"""CMA-ES for mixed spaces: CatCMA with margin (Hamano et al. 2025), told the finished trials in their order."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
from cmaes import CatCMAwM
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History, is_infeasible
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.parameters import CategoricalParameter, NumericParameter

MOST_GENERATIONS = 40  # what was told before them has no weight any more
SIGMA = 0.3  # of a range; the first generation is drawn by the start-up plan anyway


class CmaEs:
    """Moves a distribution over the whole space towards the better half of each generation."""

    start_up_trials = 10
    objectives = 1

    def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict[str, Value]:
        """Draw from the distribution that the whole generations of trials lead to."""
        encoding = _Encoding(space)
        cma = encoding.optimizer(seed)
        trials = sorted(history.of(space.wide).finished, key=lambda trial: trial.number)
        size = cma.population_size
        whole = len(trials) // size
        trials = trials[max(0, whole - MOST_GENERATIONS) * size :]
        for start in range(0, len(trials) - size + 1, size):
            # Only the order within a generation counts; what failed its gate comes last.
            ranked = sorted(trials[start : start + size], key=lambda trial: (is_infeasible(trial), trial.values))
            cma.tell([(encoding.solution(trial), float(rank)) for rank, trial in enumerate(ranked)])
        return space.resampled(lambda: encoding.values(cma.ask()), Random(seed))


class _Encoding:
    """Continuous parameters, those with a grid, and choices, as CatCMA takes them; numbers are scaled to 0..1."""

    def __init__(self, space: FeasibleSpace) -> None:
        self._space = space
        self._choices = {
            name: known for name, known in space.wide.items() if isinstance(known, CategoricalDistribution)
        }
        numbers: dict[str, NumericParameter] = {
            name: parameter
            for name in space.wide
            if not isinstance(parameter := space.declared.parameters[name], CategoricalParameter)
        }
        self._ranges = {name: parameter for name, parameter in numbers.items() if parameter.grid is None}
        self._grids = {name: parameter for name, parameter in numbers.items() if parameter.grid is not None}

    def optimizer(self, seed: int) -> CatCMAwM:
        grids = [[_to_unit(known, value) for value in known.grid or ()] for known in self._grids.values()]
        return CatCMAwM(
            x_space=[[0.0, 1.0] for _ in self._ranges] or None,
            z_space=grids or None,
            c_space=[len(known.choices) for known in self._choices.values()] or None,
            sigma=SIGMA,
            seed=seed,
        )

    def solution(self, trial: FrozenTrial) -> CatCMAwM.Solution:
        x, z = (
            np.array([_to_unit(known, trial.params[name]) for name, known in part.items()])
            for part in (self._ranges, self._grids)
        )
        most = max((len(known.choices) for known in self._choices.values()), default=0)
        c = np.zeros((len(self._choices), most), dtype=bool)
        for place, (name, known) in enumerate(self._choices.items()):
            c[place, int(known.to_internal_repr(trial.params[name]))] = True
        return CatCMAwM.Solution(x, z, c, np.concatenate([x, z]))

    def values(self, solution: CatCMAwM.Solution) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, units in ((self._ranges, solution.x), (self._grids, solution.z)):
            if units is not None:
                found |= {
                    name: _from_unit(known, float(unit))
                    for (name, known), unit in zip(part.items(), units, strict=True)
                }
        if solution.c is not None:
            for (name, known), row in zip(self._choices.items(), solution.c, strict=True):
                found[name] = known.choices[int(np.argmax(row))]
        return self._space.on_grid(found)


def _to_unit(parameter: NumericParameter, value: float) -> float:
    if getattr(parameter, "log", False):
        return math.log(value / parameter.low) / math.log(parameter.high / parameter.low)
    return (value - parameter.low) / (parameter.high - parameter.low)


def _from_unit(parameter: NumericParameter, unit: float) -> float:
    unit = min(max(unit, 0.0), 1.0)
    if getattr(parameter, "log", False):
        value = parameter.low * math.exp(unit * math.log(parameter.high / parameter.low))
        return float(min(max(value, parameter.low), parameter.high))
    return parameter.low + unit * (parameter.high - parameter.low)


MODEL = CmaEs()
