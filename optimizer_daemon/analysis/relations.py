"""How the parameters go with what was measured, over the finished trials. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from optimizer_daemon.analysis.facts import PIXELS, StudyFacts, TrialFacts
from shared.schemas import Scalar

FEWEST = 4
"""Trials below which a correlation says nothing."""
_TWO_SIDED_95 = 1.959963984540054


@dataclass(frozen=True)
class Relation:
    """Spearman's rank correlation of a parameter with a figure.

    Args:
        parameter: its name; `name=choice` for one choice of several.
        figure: the objective, or a metric's mean.
        rho: -1 to 1.
        low, high: its 95 % interval by Fisher's z with the variance of Bonett and Wright 2000.
        trials: how many it is over.
    """

    parameter: str
    figure: str
    rho: float
    low: float
    high: float
    trials: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def relations(facts: StudyFacts) -> tuple[Relation, ...]:
    """Return how each parameter goes with each figure, over the complete trials that passed their gate.

    Parameters that never changed, and figures that were not measured, are left out.
    """
    trials = [trial for trial in facts.ranking if trial.may_win]
    found = []
    for parameter, values in _columns(trials).items():
        for figure, measure in _figures(facts).items():
            pairs = [
                (value, measured)
                for value, trial in zip(values, trials, strict=True)
                if value is not None and (measured := measure(trial)) is not None
            ]
            relation = _relation(parameter, figure, pairs)
            if relation is not None:
                found.append(relation)
    return tuple(found)


def _figures(facts: StudyFacts) -> dict[str, Callable[[TrialFacts], float | None]]:
    def mean_of(metric: str) -> Callable[[TrialFacts], float | None]:
        return lambda trial: None if trial.final is None else trial.final.mean(metric)

    return {facts.objective: lambda trial: trial.value, **{metric: mean_of(metric) for metric in PIXELS}}


def _columns(trials: Sequence[TrialFacts]) -> dict[str, list[float | None]]:
    """Return a column of numbers for each parameter that was changed; choices become 0 and 1."""
    names = dict.fromkeys(name for trial in trials for name in trial.parameters)
    columns: dict[str, list[float | None]] = {}
    for name in names:
        values = [trial.parameters.get(name) for trial in trials]
        kinds = [value for value in values if value is not None]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in kinds):
            columns[name] = [None if value is None else float(value) for value in values]
            continue
        choices = sorted(set(map(str, kinds)))
        for choice in choices[1:] if len(choices) == 2 else choices:
            columns[f"{name}={choice}"] = [_is(value, choice) for value in values]
    return {name: column for name, column in columns.items() if len(set(column) - {None}) > 1}


def _is(value: Scalar | None, choice: str) -> float | None:
    return None if value is None else float(str(value) == choice)


def _relation(parameter: str, figure: str, pairs: Sequence[tuple[float, float]]) -> Relation | None:
    if len(pairs) < FEWEST:
        return None
    first, second = (rankdata(column) for column in zip(*pairs, strict=True))
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    rho = float(np.clip(np.corrcoef(first, second)[0, 1], -1.0, 1.0))
    low, high = _interval(rho, len(pairs))
    return Relation(parameter, figure, rho, low, high, len(pairs))


def _interval(rho: float, count: int) -> tuple[float, float]:
    if abs(rho) == 1.0:
        return rho, rho
    half = _TWO_SIDED_95 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    centre = math.atanh(rho)
    return math.tanh(centre - half), math.tanh(centre + half)


def by_parameter(found: Sequence[Relation], figure: str) -> Mapping[str, Relation]:
    """Return the relations with one figure, the strongest first."""
    chosen = [relation for relation in found if relation.figure == figure]
    return {r.parameter: r for r in sorted(chosen, key=lambda r: (-abs(r.rho), r.parameter))}
