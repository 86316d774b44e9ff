"""Where a stage that stays near the best trials of the earlier ones draws from."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import islice
from random import Random

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optimizer_daemon.optuna_adapter.draws import drawn_values, stage_name
from optimizer_daemon.optuna_adapter.history import best_first, is_infeasible
from optimizer_daemon.search.expressions import Value, is_number
from optimizer_daemon.search.parameters import CategoricalParameter, NumericParameter, Parameter, with_range
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.search.stage import Stage
from shared.errors import UserError

GLOBAL_SHARE = 0.15
"""Share of the draws over the whole stage: the best trials so far may all lie on the wrong hill."""
RADIUS = 0.125
"""Of a range, its logarithm where it is drawn so, on either side of a trial's value."""


def region_of(
    stage: Stage, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection], rng: Random
) -> SearchSpace:
    """Return what one trial is drawn from: mostly the surroundings of one of the best trials, else the whole stage.

    Numbers stay within RADIUS of that trial's, choices are those of any of the best.

    Args:
        trials: of the whole study.
        directions: one for each objective; with several the best are those of the first fronts.
    """
    best = _best(stage, trials, directions)
    if not best or rng.random() < GLOBAL_SHARE:
        return stage.space
    centre = rng.choice(best)
    changed = {
        name: part
        for name, parameter in stage.space.parameters.items()
        if name not in stage.pinned and (part := _around(parameter, centre.get(name), best, name)) is not None
    }
    region = stage.space.with_parameters(changed)
    try:
        region.draw(Random(0))
    except UserError:  # that trial trained longer, or shorter, than the rules let one do here
        return stage.space
    return region


def _best(
    stage: Stage, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]
) -> list[Mapping[str, Value]]:
    """Return the values of the best feasible trials of the earlier stages."""
    measured = [
        trial
        for trial in trials
        if trial.state is TrialState.COMPLETE and stage_name(trial) in stage.earlier and not is_infeasible(trial)
    ]
    return [drawn_values(trial) for trial in islice(best_first(measured, directions), stage.around_best or 0)]


def _around(
    parameter: Parameter, centre: Value | None, best: Sequence[Mapping[str, Value]], name: str
) -> Parameter | None:
    """Return the part of a parameter that is near; None where the centre has no value of it in this stage."""
    if isinstance(parameter, CategoricalParameter):
        seen = [known.get(name) for known in best]
        choices = tuple(choice for choice in parameter.choices if choice in seen)
        return CategoricalParameter(type="categorical", choices=choices) if choices else None
    return _interval(parameter, centre) if is_number(centre) else None


def _interval(parameter: NumericParameter, centre: float) -> NumericParameter:
    """Return the part of a range around a value, at least one step to each side of it."""
    low, high = parameter.low, parameter.high
    centre = min(max(centre, low), high)
    if getattr(parameter, "log", False):
        factor = (high / low) ** RADIUS
        return with_range(parameter, max(low, centre / factor), min(high, centre * factor))
    width = RADIUS * (high - low)
    grid = parameter.grid
    if grid is None:
        return with_range(parameter, max(low, centre - width), min(high, centre + width))
    place = min(bisect_left(grid, centre), len(grid) - 1)
    steps = max(1, math.floor(width / (grid[1] - grid[0]))) if len(grid) > 1 else 0
    return with_range(parameter, grid[max(0, place - steps)], grid[min(len(grid) - 1, place + steps)])
