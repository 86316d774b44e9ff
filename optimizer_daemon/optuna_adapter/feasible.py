"""A search space in Optuna's form, that never lets an infeasible configuration out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.parameters import CategoricalParameter, FloatParameter, Parameter
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.search.stage import Stage

RESAMPLES = 100
NEIGHBOURS = 20


@dataclass(frozen=True)
class FeasibleSpace:
    """What a model draws from.

    Args:
        space: what a draw must fit: the declared space, narrowed by a stage; a pinned parameter has one choice in it.
        declared: the study's search space. Models see its ranges in every stage, for narrower ones would cost them
            what they have learned.
        pinned: names of the pinned parameters, which Optuna does not know.
    """

    space: SearchSpace
    declared: SearchSpace
    pinned: frozenset[str] = frozenset()

    @classmethod
    def of(cls, stage: Stage) -> FeasibleSpace:
        """Return what a stage draws from."""
        return cls(stage.space, stage.declared, frozenset(stage.pinned))

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter that Optuna knows."""
        parameters = self.declared.parameters.items()
        return {name: distribution_of(parameter) for name, parameter in parameters if name not in self.pinned}

    @cached_property
    def wide(self) -> dict[str, BaseDistribution]:
        """Those with more than one value, which a model draws jointly."""
        return {name: known for name, known in self.distributions.items() if not known.single()}

    def draw(self, rng: Random) -> dict[str, Value]:
        """Draw a feasible configuration as the start-up trials are drawn."""
        return self.space.draw(rng)

    def completed(self, modelled: Mapping[str, Any]) -> dict[str, Value]:
        """Return a value for each parameter, those with one value added and all of them on their grids."""
        return {
            name: parameter.snap(modelled[name]) if name in modelled else parameter.ends[0]
            for name, parameter in self.space.parameters.items()
        }

    def on_grid(self, modelled: Mapping[str, Any]) -> dict[str, Any]:
        """Return a draw with each stepped number moved to the nearest of its grid."""
        moved = dict(modelled)
        for name, value in modelled.items():
            grid = getattr(self.declared.parameters[name], "grid", None)
            if grid is not None:
                distances = [abs(known - value) for known in grid]
                moved[name] = grid[distances.index(min(distances))]
        return moved

    def is_feasible(self, modelled: Mapping[str, Any]) -> bool:
        """Tell whether a joint draw of the wide parameters breaks no rule."""
        return self.space.is_feasible(self.completed(modelled))

    def resampled(self, sample: Callable[[], Mapping[str, Any]], rng: Random) -> dict[str, Value]:
        """Return the first feasible one of many samples; where none is, what is nearest to the last."""
        for _ in range(RESAMPLES):
            values = self.completed(sample())
            if self.space.is_feasible(values):
                return values
        return self.nearest(values, rng)

    def nearest(self, values: Mapping[str, Value], rng: Random) -> dict[str, Value]:
        """Return a feasible configuration that differs from an infeasible one in as few parameters as possible.

        Several feasible draws are led back to it, parameter by parameter, as far as the rules let them.
        """
        candidates = []
        for _ in range(NEIGHBOURS):
            candidate, changed = self.draw(rng), 0
            for name in rng.sample(list(values), len(values)):
                closer = {**candidate, name: values[name]}
                if self.space.is_feasible(closer):
                    candidate = closer
                else:
                    changed += 1
            candidates.append((changed, candidate))
        return min(candidates, key=lambda known: known[0])[1]


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's form of a declared parameter."""
    if isinstance(parameter, CategoricalParameter):
        return CategoricalDistribution(parameter.choices)
    if isinstance(parameter, FloatParameter):
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
    return IntDistribution(parameter.low, parameter.high, step=parameter.step)
