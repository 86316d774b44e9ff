"""How much each parameter decides the objective, as Optuna estimates it."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState


def importances(study_name: str, storage_url: str) -> dict[str, float]:
    """Return each parameter's share of the influence, the largest first; empty while there is too little to tell.

    Only complete trials that passed their gate count.
    """
    stored = optuna.load_study(study_name=study_name, storage=storage_url)
    feasible = [
        trial
        for trial in stored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if all(value <= 0 for value in trial.constraints.values())
    ]
    if len(feasible) < 2:
        return {}
    study = optuna.create_study(direction="minimize")
    study.add_trials(feasible)
    return {name: float(share) for name, share in optuna.importance.get_param_importances(study).items()}
