"""Feasible draws: whole configurations of a search space, none of which breaks a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from optimizer_daemon.optuna_adapter.draws import DRAW
from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History, is_infeasible, with_values
from optimizer_daemon.optuna_adapter.models import Model
from optimizer_daemon.optuna_adapter.several import objective_curves, score_of
from optimizer_daemon.optuna_adapter.trust_region import region_of
from optimizer_daemon.search.curves import Curve, Forecast, Imputation
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.stage import Stage

EPOCHS = "max_train_epochs"
MOST_DRAWS = 100  # until one comes that nobody trains


class FeasibleSampler(BaseSampler):
    """Draws from the space's own start-up plan first, then by a model.

    Each draw depends on (seed, trial number) and the trials before alone, so a restarted daemon neither repeats the
    draws of an earlier one nor changes one it is asked to make again.

    Args:
        stage: what is drawn from; it may be replaced by the next one.
        seed: the study's seed.
        model: what draws once there are enough finished trials.
    """

    def __init__(self, stage: Stage, seed: int, model: Model) -> None:
        self.stage = stage
        self._seed = seed
        self._model = model

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter that Optuna knows in this stage."""
        return FeasibleSpace.of(self.stage).distributions

    def draw(self, study: Study, trial: FrozenTrial) -> dict[str, Value]:
        """Return a feasible value for each declared parameter, the pinned ones too; not what another one trains now.

        Only a space with fewer configurations than trials that run at once makes it repeat one of these.
        """
        running = [
            known.user_attrs[DRAW]["values"]
            for known in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if DRAW in known.user_attrs and known.number != trial.number
        ]
        for again in range(MOST_DRAWS):
            values = self._drawn(study, trial, again)
            if values not in running:
                break
        return values

    def _drawn(self, study: Study, trial: FrozenTrial, again: int) -> dict[str, Value]:
        """Draw once; after the first time by the start-up plan, for a model may insist."""
        rng = Random(f"{self._seed}/{trial.number}/{again}" if again else f"{self._seed}/{trial.number}")
        trials = [known for known in study.get_trials(deepcopy=False) if known.number != trial.number]
        finished = 0 if again else sum(known.state in (TrialState.COMPLETE, TrialState.PRUNED) for known in trials)
        space = FeasibleSpace.of(self.stage)
        if self.stage.around_best is not None:
            space = replace(space, space=region_of(self.stage, trials, study.directions, rng))
        start_up = self._model.start_up_trials
        if start_up is None or finished < start_up or not space.wide:
            return space.draw(rng)
        history = History(study.directions, _learnable(trials, study.metric_names or ()))
        return self._model.propose(history, space, rng.getrandbits(32))

    # What Optuna asks for when it suggests: always the stored draw, whole.

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        draw: dict[str, Value] = trial.user_attrs[DRAW]["values"]
        return {name: draw[name] for name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # Optuna comes here for a value outside its distribution; drawn alone it could break a rule.
        raise AssertionError(f"{param_name} of trial {trial.number} does not fit {param_distribution}")


def curve_of(trial: FrozenTrial) -> Curve | None:
    """Return a trial's scores by epoch; None where its draw does not say how long it trains."""
    horizon = _horizon(trial)
    return None if horizon is None else Curve.of(horizon, trial.intermediate_values, score_of(trial))


def _horizon(trial: FrozenTrial) -> int | None:
    horizon = trial.user_attrs.get(DRAW, {}).get("values", {}).get(EPOCHS)
    return horizon if isinstance(horizon, int) else None


def _learnable(trials: Sequence[FrozenTrial], objectives: Sequence[str] = ()) -> list[FrozenTrial]:
    """Return the trials a model can learn from: finished and stopped ones by their forecast, running ones.

    With several objectives finished trials count by what was measured and stopped ones by their imputed ends. A trial
    that failed its gate, or whose value is not its last score, counts by its value.

    Args:
        objectives: names, where there are several.
    """
    measured = (trial for trial in trials if trial.state is TrialState.COMPLETE and not is_infeasible(trial))
    peers = list(zip(*filter(None, (_curves(trial, objectives) for trial in measured)), strict=True))
    # Of several objectives finished trials keep their values, and stopped ones are imputed on that very scale.
    how = Imputation if objectives else Forecast
    forecasts = [how(curves) for curves in peers or [()] * (len(objectives) or 1)]
    learnable = []
    for trial in trials:
        ends: list[float | None] = []
        if trial.state is TrialState.PRUNED or (not objectives and _ends_with_its_value(trial)):
            curves = _curves(trial, objectives)
            ends = [forecast.end(curve) for forecast, curve in zip(forecasts, curves, strict=False)]
        values = [end for end in ends if end is not None]
        if values and len(values) == len(ends):
            learnable.append(with_values(trial, values))
        elif trial.state in (TrialState.COMPLETE, TrialState.RUNNING):
            learnable.append(trial)
    return learnable


def _curves(trial: FrozenTrial, objectives: Sequence[str]) -> list[Curve]:
    """Return a trial's curve of each objective; none where its draw does not say how long it trains."""
    if objectives:
        horizon = _horizon(trial)
        return [] if horizon is None else objective_curves(trial, horizon, objectives)
    curve = curve_of(trial)
    return [] if curve is None else [curve]


def _ends_with_its_value(trial: FrozenTrial) -> bool:
    """Tell whether a trial is finished, passed its gate, and is judged by its last score."""
    if trial.state is not TrialState.COMPLETE or is_infeasible(trial) or len(trial.values) != 1:
        return False
    return bool(trial.intermediate_values.get(_horizon(trial) or -1) == trial.values[0])
