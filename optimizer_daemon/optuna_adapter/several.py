"""What a study of several objectives keeps beside Optuna's own values.

Optuna's trial holds the final value of each objective, and in its intermediate values the score that trainings are
stopped by. Two user attributes hold the rest: that score at the end, and each objective at each epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from optimizer_daemon.search.curves import Curve
from shared.errors import StudyMismatchError
from shared.schemas import Objective

SCORE = "score"
"""User attribute of a finished trial: the score that ranks running trainings."""

VALUES = "values_by_epoch"
"""User attribute: {epoch: {objective: value}}."""

_DIRECTIONS = {"minimise": StudyDirection.MINIMIZE, "maximise": StudyDirection.MAXIMIZE}


def directions_of(objectives: Sequence[Objective]) -> list[StudyDirection]:
    """Return Optuna's directions; one to be minimised for a study of one score."""
    return [_DIRECTIONS[known.direction] for known in objectives] or [StudyDirection.MINIMIZE]


def name_objectives(study: optuna.Study, objectives: Sequence[Objective]) -> None:
    """Write down what a new study optimises, or see that an older one optimises the same.

    Raises:
        StudyMismatchError: it does not.
    """
    known = study.metric_names
    if known is None and objectives and len(study.directions) == len(objectives):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the name's place in the database is not ours
            study.set_metric_names([objective.name for objective in objectives])
        known = study.metric_names
    asked = [objective.name for objective in objectives]
    if (known or []) != asked or study.directions != directions_of(objectives):
        raise StudyMismatchError(
            f"study {study.study_name!r} was made with other objectives ({', '.join(known or []) or 'one score'} -> "
            f"{', '.join(asked) or 'one score'}); use those again, or another --study-name and --output-dir"
        )


def remember_values(trial: Trial, epoch: int, values: Mapping[str, float]) -> None:
    """Keep each objective's value at an epoch; a second one replaces the first."""
    known = trial.user_attrs.get(VALUES, {})
    if known.get(str(epoch)) != dict(values):
        trial.set_user_attr(VALUES, {**known, str(epoch): dict(values)})


def values_by_epoch(trial: FrozenTrial) -> dict[int, dict[str, float]]:
    """Return each objective's value at each measured epoch."""
    return {int(epoch): dict(values) for epoch, values in trial.user_attrs.get(VALUES, {}).items()}


def score_of(trial: FrozenTrial) -> float | None:
    """Return the score that a complete trial is ranked by; None for others."""
    if trial.state is not TrialState.COMPLETE or trial.values is None:
        return None
    score = trial.user_attrs.get(SCORE)
    return trial.values[0] if score is None else float(score)


def objective_curves(trial: FrozenTrial, horizon: int, names: Sequence[str]) -> list[Curve]:
    """Return a trial's values of each objective by epoch, with the final one of a complete trial."""
    measured = values_by_epoch(trial)
    finals = trial.values if trial.state is TrialState.COMPLETE else [None] * len(names)
    return [
        Curve.of(horizon, {epoch: values[name] for epoch, values in measured.items() if name in values}, final)
        for name, final in zip(names, finals, strict=True)
    ]
