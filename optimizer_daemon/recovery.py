"""What an earlier daemon left: trials nobody finished, trainings that live on, files that are half written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from datetime import datetime
from typing import TYPE_CHECKING

from optimizer_daemon.finalists import fresh_seed
from optimizer_daemon.lifecycle import ending_of
from optimizer_daemon.runner import LiveTrial, Runner
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.training_log import TrainingLog
from shared.errors import DiskError, StudyMismatchError, UnreadableFileError
from shared.failpoints import reach
from shared.files import read_model, read_or_set_aside, sweep_temp_files, write_model
from shared.layout import StudyLayout, TrialLayout
from shared.logs import log_change
from shared.schemas import CurvePoint, TrialParams, TrialState, TrialStateName
from shared.supervise import STOP_TIMEOUT_S
from shared.supervised import adopt, stop_together

if TYPE_CHECKING:
    from optimizer_daemon.optuna_adapter.study import Draw, Ended, TuningStudy

KILL_TIMEOUT_S = 10.0

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

    Nothing is drawn again: a crash between the draw and params.json is completed from the stored draw. A training that
    lives although its trial is over is ended, and what is damaged of such a trial is written again.
    """
    found = []
    for draw in study.running():
        live = live_trial(layout, draw, space, seed=seed, time=time)
        adopted = runner.adopt(live, now)
        if not adopted and live.state.state == "training" and _never_began(live.layout):
            live.write_state(state="drawn", started=None)  # so it costs none of the attempts
        if adopted and live.state.state in ("drawn", "interrupted"):  # what the state file missed when we were killed
            live.write_state(state="training", reason=None, started=live.state.started or time)
        log_change(_log, "trial found", trial=live.number, state=live.state.state, trainer_alive=adopted)
        found.append(live)
    for ended in study.ended():
        _mend(layout, ended, space, seed=seed, time=time)
    for number in end_left_trainings(layout, "its trial was over", apart_from={live.number for live in found}):
        log_change(_log, "stray training ended", level=logging.WARNING, trial=number)
    return found


def _mend(layout: StudyLayout, ended: Ended, space: SearchSpace, *, seed: int, time: datetime) -> None:
    """Write the files of a trial that is over again from the study, where they are damaged or gone."""
    trial = layout.trial_of_optuna(ended.draw.number)
    if not trial.folder.is_dir():
        return
    params = read_or_set_aside(trial.params, TrialParams, time).content
    if params is None:
        params = params_of(ended.draw, space, seed)
        write_model(trial.params, params)
        log_change(_log, "params.json rebuilt", level=logging.WARNING, trial=params.trial)
    if read_or_set_aside(trial.state, TrialState, time).content is not None:
        return
    last = params.max_train_epochs
    curve = tuple(
        CurvePoint(
            epoch=epoch,
            value=value,
            checkpoint=(trial.final_checkpoint if epoch == last else trial.intermediate_checkpoint(epoch)).stem,
            values=ended.values_by_epoch.get(epoch, {}),
        )
        for epoch, value in sorted(ended.curve.items())
    )
    failed = ended.value is None and not ended.pruned
    state = TrialState(
        trial=params.trial,
        optuna_number=ended.draw.number,
        state="pruned" if ended.pruned else "failed" if failed else "complete",
        reason=ended.reason or (None if ended.value is not None else "unknown"),
        attempt=1,
        drawn=ended.draw.drawn,
        started=ended.draw.drawn,
        ended=ended.ended,
        value=ended.value,
        objectives=ended.values,
        feasible=None if ended.value is None else ended.reason is None,
        curve=curve,
        finalist_of=params.finalist_of,
    )
    write_model(trial.state, state)
    log_change(_log, "trial_state.json rebuilt", level=logging.WARNING, trial=params.trial)


def end_left_trainings(layout: StudyLayout, reason: str, apart_from: Set[int] = frozenset()) -> list[int]:
    """End every training that lives in the folder, so that the next daemon goes on with it; return their trials.

    Only for whoever holds the optimizer's lock.
    """
    left = {
        trial.number: process
        for trial in layout.list_trials()
        if trial.number is not None and trial.number not in apart_from and (process := adopt(trial.folder)) is not None
    }
    stop_together(list(left.values()), term_timeout_s=STOP_TIMEOUT_S, kill_timeout_s=KILL_TIMEOUT_S)
    for number, process in left.items():
        trial = layout.trial(number)
        try:
            state = read_model(trial.state, TrialState)
            finished = ending_of(process.exit_record()) == "finished"
        except (FileNotFoundError, UnreadableFileError):
            continue  # whoever starts next looks at the folder
        if state.state == "training" and not finished:
            write_model(trial.state, state.model_copy(update={"state": "interrupted", "reason": reason}))
    return list(left)


def sweep_leftovers(layout: StudyLayout) -> None:
    """Remove the temporary files of killed writers, wherever this daemon, its trainers or its reports write.

    Raises:
        DiskError: one could not be removed.
    """
    for folder in (layout.root, layout.results.folder, layout.results.analysis):
        sweep_temp_files(folder)
    for trial in layout.list_trials():
        sweep_temp_files(trial.folder)
        sweep_temp_files(trial.final_evaluation.folder)


def live_trial(layout: StudyLayout, draw: Draw, space: SearchSpace, *, seed: int, time: datetime) -> LiveTrial:
    """Return the trial of a draw; whatever of its folder is missing or damaged is written from the draw."""
    trial = layout.trial_of_optuna(draw.number)
    try:
        trial.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(trial.folder, error) from error
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
            trial=params.trial,
            optuna_number=draw.number,
            state=name,
            attempt=1,
            drawn=draw.drawn,
            reason=None,
            finalist_of=params.finalist_of,
        )
        write_model(trial.state, state)
    return LiveTrial(trial, params, state, TrainingLog(trial.training_log))


def params_of(draw: Draw, space: SearchSpace, seed: int) -> TrialParams:
    """Return what params.json says for a draw; `seed` is the study's."""
    complete: Mapping[str, Value] = space.complete(draw.values)
    # One for all, so that trials differ by their parameters only; a finalist's score must owe nothing to it.
    usual = seed if draw.finalist_of is None else fresh_seed(seed, draw.number)
    return TrialParams(
        trial=draw.number + 1,
        optuna_number=draw.number,
        parameters=dict(complete),
        derived=tuple(space.derived),
        origin="finalist" if draw.finalist_of is not None else "enqueued" if draw.enqueued else "sampler",
        finalist_of=None if draw.finalist_of is None else draw.finalist_of + 1,
        stage=draw.stage,
        training_seed=usual if draw.training_seed is None else draw.training_seed,
    )


def _never_began(trial: TrialLayout) -> bool:
    """Tell whether a training that was announced left no trace: nobody came to start its supervisor."""
    said = trial.training_log.exists() and trial.training_log.stat().st_size > 0
    return not said and not trial.trainer_exit.exists() and not trial.list_training_states()


def refuse_unknown_trials(study: TuningStudy, layout: StudyLayout) -> None:
    """See that the database knows every trial of the folder.

    Raises:
        StudyMismatchError: it does not; a copy from earlier was put in its place.
    """
    numbers = [trial.number for trial in layout.list_trials() if trial.number is not None and trial.params.exists()]
    if numbers and max(numbers) > study.trial_count:
        raise StudyMismatchError(
            f"{layout.root} holds {layout.trial(max(numbers)).name}, but the study knows only {study.trial_count} "
            "trials; put its database back, or use another --output-dir"
        )
