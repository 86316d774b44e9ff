"""How much each parameter decides the objective, as Optuna estimates it."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from optimizer_daemon.optuna_adapter.history import is_infeasible, with_values
from optimizer_daemon.optuna_adapter.several import score_of


def importances(study_name: str, storage_url: str) -> dict[str, float]:
    """Return each parameter's share of the influence, the largest first; empty while there is too little to tell.

    Only complete trials that passed their gate count. With several objectives it is the influence on the score that
    trainings are stopped by.
    """
    stored = optuna.load_study(study_name=study_name, storage=storage_url)
    feasible = [
        with_values(trial, [score])
        for trial in stored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not is_infeasible(trial) and (score := score_of(trial)) is not None
    ]
    if len(feasible) < 2:
        return {}
    study = optuna.create_study(direction="minimize")
    study.add_trials(feasible)
    return {name: float(share) for name, share in optuna.importance.get_param_importances(study).items()}
