"""Which trials a starting daemon finds unfinished, and in which state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime

from optimizer_daemon.optuna_adapter.study import Draw, TuningStudy
from optimizer_daemon.runner import LiveTrial, Runner
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.training_log import TrainingLog
from shared.errors import StudyMismatchError
from shared.failpoints import reach
from shared.files import read_or_set_aside, write_model
from shared.layout import StudyLayout
from shared.logs import log_change
from shared.schemas import TrialParams, TrialState, TrialStateName

_log = logging.getLogger(__name__)


def recover(
    study: TuningStudy,
    layout: StudyLayout,
    space: SearchSpace,
    runner: Runner,
    *,
    seed: int,
    now: float,
    time: datetime,
) -> list[LiveTrial]:
    """Return every trial that the study was not told about, by number, each with its trainer where that still lives.

    Nothing is drawn again: a crash between the draw and params.json is completed from the stored draw.

    Raises:
        StudyMismatchError: the folder holds trials that the study does not know.
    """
    _refuse_unknown_trials(study, layout)
    found = []
    for draw in study.running():
        live = live_trial(layout, draw, space, seed=seed, time=time)
        adopted = runner.adopt(live, now)
        log_change(_log, "trial found", trial=live.number, state=live.state.state, trainer_alive=adopted)
        found.append(live)
    return found


def live_trial(layout: StudyLayout, draw: Draw, space: SearchSpace, *, seed: int, time: datetime) -> LiveTrial:
    """Return the trial of a draw; whatever of its folder is missing or damaged is written from the draw."""
    trial = layout.trial_of_optuna(draw.number)
    trial.folder.mkdir(exist_ok=True)
    reach("optimizer.folder_made")
    params = read_or_set_aside(trial.params, TrialParams, time).content
    if params is None:
        params = params_of(draw, space, seed)
        write_model(trial.params, params)
        reach("optimizer.params_written")
    reading = read_or_set_aside(trial.state, TrialState, time)
    state = reading.content
    if state is None:
        # A damaged state tells nothing; "training" lets the folder decide how far the trial got.
        name: TrialStateName = "training" if reading.set_aside is not None else "drawn"
        state = TrialState(
            trial=params.trial, optuna_number=draw.number, state=name, attempt=1, drawn=draw.drawn, reason=None
        )
        write_model(trial.state, state)
    return LiveTrial(trial, params, state, TrainingLog(trial.training_log))


def params_of(draw: Draw, space: SearchSpace, seed: int) -> TrialParams:
    """Return what params.json says for a draw; `seed` is the study's."""
    complete: Mapping[str, Value] = space.complete(draw.values)
    return TrialParams(
        trial=draw.number + 1,
        optuna_number=draw.number,
        parameters=dict(complete),
        derived=tuple(space.derived),
        origin="sampler",
        stage=draw.stage,
        training_seed=seed,  # one for all, so that trials differ by their parameters only
    )


def _refuse_unknown_trials(study: TuningStudy, layout: StudyLayout) -> None:
    numbers = [trial.number for trial in layout.list_trials() if trial.number is not None and trial.params.exists()]
    if numbers and max(numbers) > study.trial_count:
        raise StudyMismatchError(
            f"{layout.root} holds {layout.trial(max(numbers)).name}, but the study knows only {study.trial_count} "
            "trials; put its database back, or use another --output-dir"
        )
