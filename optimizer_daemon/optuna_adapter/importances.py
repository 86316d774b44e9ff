"""How much each parameter decides the objective, by Optuna's PED-ANOVA, and how sure that is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from optimizer_daemon.optuna_adapter.history import is_infeasible, with_values
from optimizer_daemon.optuna_adapter.several import score_of
from optimizer_daemon.optuna_adapter.storage import not_opened, open_storage
from shared.errors import UserError

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell of every resample

RESAMPLES = 30
MOST_RESAMPLED = 100
"""Trials in a resample: with more of them each takes a second, and their spread is scaled instead."""
FEWEST_FOR_INTERVAL = 5


@dataclass(frozen=True)
class Importance:
    """One parameter's share of the influence on the objective, 0-1.

    Args:
        low, high: 80 % interval by the bootstrap over the trials; None where there are too few of them.
    """

    share: float
    low: float | None
    high: float | None


def importances(study_name: str, storage_url: str) -> dict[str, Importance]:
    """Return each parameter's importance, the largest first; empty while there is too little to tell.

    Only complete trials that passed their gate count. PED-ANOVA says what sets the best tenth of them apart; with
    several objectives by the score that trainings are stopped by.

    Raises:
        LabError: the database is missing, damaged, or does not hold the study.
    Source: Watanabe, Bansal, Hutter 2023, "PED-ANOVA", arXiv:2304.10255.
    """
    feasible = [
        with_values(trial, [score])
        for trial in _complete_trials(study_name, storage_url)
        if not is_infeasible(trial) and (score := score_of(trial)) is not None
    ]
    if len(feasible) < 2:
        return {}
    shares = _shares(feasible)
    if len(feasible) < FEWEST_FOR_INTERVAL:
        return {name: Importance(share, None, None) for name, share in shares.items()}
    rng = random.Random(0)
    size = min(len(feasible), MOST_RESAMPLED)
    resampled = [_shares(rng.choices(feasible, k=size)) for _ in range(RESAMPLES)]
    shrink = math.sqrt(size / len(feasible))
    return {
        name: _with_interval(share, [shares.get(name, 0.0) for shares in resampled], shrink)
        for name, share in shares.items()
    }


def _complete_trials(study_name: str, storage_url: str) -> list[FrozenTrial]:
    url = make_url(storage_url)
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).exists():
        raise UserError(f"{url.database}: missing")  # opening it would make an empty one
    storage = open_storage(storage_url)
    try:
        study = optuna.load_study(study_name=study_name, storage=storage)
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    except KeyError as error:
        raise UserError(f"{storage_url} holds no study {study_name!r}") from error
    except (StorageInternalError, SQLAlchemyError) as error:
        raise not_opened(storage_url, error) from error
    finally:
        storage.engine.dispose()


def _shares(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    study = optuna.create_study(direction="minimize")
    study.add_trials(trials)
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in shares.items()}


def _with_interval(share: float, resampled: Sequence[float], shrink: float) -> Importance:
    """Give a share its 80 % interval; a smaller resample spreads more, by the root of the sizes' ratio."""
    around = sorted(share + (value - share) * shrink for value in resampled)
    tenth = len(around) // 10
    return Importance(share, max(0.0, min(share, around[tenth])), min(1.0, max(share, around[-1 - tenth])))
