"""The Optuna study behind a study folder: ask, report, tell, resume. One process writes: the optimizer daemon."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from optimizer_daemon.optuna_adapter.draws import DRAW
from optimizer_daemon.optuna_adapter.history import is_infeasible
from optimizer_daemon.optuna_adapter.live_copy import OWNER, LiveCopy
from optimizer_daemon.optuna_adapter.models import load_sampler
from optimizer_daemon.optuna_adapter.sampler import FeasibleSampler, curve_of
from optimizer_daemon.optuna_adapter.several import (
    SCORE,
    directions_of,
    name_objectives,
    remember_values,
    score_of,
    values_by_epoch,
)
from optimizer_daemon.optuna_adapter.storage import file_of, not_opened, open_storage
from optimizer_daemon.search.curves import Curve
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.search.stage import Stage
from shared.errors import ResourceError, StudyMismatchError
from shared.failpoints import reach
from shared.schemas import Objective

_SPACE = "search_space"
_RULES = "search_rules"
_REASON = "reason"
_GATE = "gate"

optuna.logging.set_verbosity(optuna.logging.WARNING)  # our own log says what happens


@dataclass(frozen=True)
class Draw:
    """One drawn configuration.

    Args:
        number: Optuna's number of the trial, counted from 0.
        values: a value for each declared parameter.
        stage: the stage it was drawn in.
        drawn: when.
        enqueued: somebody asked for it.
        training_seed: seed of its training; None for the usual one.
        finalist_of: number of the trial whose configuration this is, counted from 0; None for no finalist.
    """

    number: int
    values: dict[str, Value]
    stage: str | None
    drawn: datetime
    enqueued: bool = False
    training_seed: int | None = None
    finalist_of: int | None = None


@dataclass(frozen=True)
class Ended:
    """A trial that the study was told about.

    Args:
        draw: what it was.
        value: its objective, with several the score that ranks it; None when it has none.
        pruned: it was stopped because it was losing.
        reason: why it failed or was stopped, or why it must not win.
        curve: the objective by epoch.
        ended: when it was told.
        values: each of several objectives by name.
        values_by_epoch: the same at each measured epoch.
    """

    draw: Draw
    value: float | None
    pruned: bool
    reason: str | None
    curve: dict[int, float]
    ended: datetime
    values: dict[str, float] = field(default_factory=dict)
    values_by_epoch: dict[int, dict[str, float]] = field(default_factory=dict)


P = ParamSpec("P")
R = TypeVar("R")


def _with_remedy(method: Callable[P, R]) -> Callable[P, R]:
    """Say what to do when the database fails under a method; the trials' own files still hold everything."""

    @functools.wraps(method)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (StorageInternalError, SQLAlchemyError) as error:
            raise ResourceError(
                f"the study's database failed ({error}); free space or mend it, then the same command goes on"
            ) from error

    return explained


def _changing(method: Callable[Concatenate[TuningStudy, P], R]) -> Callable[Concatenate[TuningStudy, P], R]:
    """Bring the copy of the database up to date before anybody learns of what a method did; see `_with_remedy`."""

    @_with_remedy
    @functools.wraps(method)
    def published(study: TuningStudy, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result = method(study, *args, **kwargs)
        if study._copy is not None:
            study._copy.publish()
        return result

    return published


class TuningStudy:
    """One Optuna study. Any method raises ResourceError when the database fails.

    `open` continues the study of that name in that storage, or makes it.
    """

    def __init__(
        self, study: optuna.Study, sampler: FeasibleSampler, close: Callable[[], None], copy: LiveCopy | None = None
    ) -> None:
        self.close = close
        self._copy = copy
        self._study = study
        self._sampler = sampler
        self._objectives = study.metric_names or []

    @property
    def stage(self) -> Stage:
        """What new trials are drawn from; may be replaced by another stage of the same space."""
        return self._sampler.stage

    @stage.setter
    def stage(self, stage: Stage) -> None:
        self._sampler.stage = stage

    @classmethod
    def open(
        cls,
        name: str,
        storage_url: str,
        space: SearchSpace,
        *,
        seed: int,
        folder_id: str,
        stage: Stage | None = None,
        sampler: str = "tpe",
        copy: Path | None = None,
        objectives: Sequence[Objective] = (),
    ) -> Self:
        """Open or make the study.

        Args:
            name: the study's name.
            storage_url: a SQLAlchemy URL.
            space: the search space; its parameters must be those the study was made with.
            seed: seed of the draws.
            folder_id: identity of the study folder, which owns the study.
            stage: the part of `space` that is drawn from; None for all of it.
            sampler: a name of SAMPLERS.
            copy: where a whole copy of the SQLite database is kept; the study is continued from it where it is the
                later of the two.
            objectives: what is optimised, where that is more than one score.

        Raises:
            StudyMismatchError: the study belongs to another folder or has other parameters or objectives.
            SettingsError: the storage cannot be opened, or the sampler cannot do with so many objectives.
            UnknownPluginError: there is no such sampler.
            DiskError: the disk is full.
        """
        feasible = FeasibleSampler(stage or Stage.of(space), seed, load_sampler(sampler, len(objectives) or 1))
        kept = None if copy is None else LiveCopy.prepared(file_of(storage_url), copy, name, folder_id)
        storage = open_storage(storage_url)
        with contextlib.ExitStack() as refused:
            refused.callback(storage.engine.dispose)  # a refused database is left as it was, without SQLite's log
            try:
                study = optuna.create_study(
                    storage=storage,
                    study_name=name,
                    sampler=feasible,
                    directions=directions_of(objectives),
                    load_if_exists=True,
                )
                _check_owner(study, storage_url, folder_id)
                name_objectives(study, objectives)
                _check_space(study, _SPACE, {known: str(known_as) for known, known_as in space.parameters.items()})
                _check_space(study, _RULES, space.rules())
            except (StorageInternalError, SQLAlchemyError) as error:
                raise not_opened(storage_url, error) from error
            if kept is not None:
                refused.callback(kept.close)
                kept.publish()
            opened = refused.pop_all()
        return cls(study, feasible, opened.close, kept)

    @_changing
    def ask(self) -> Draw:
        """Draw a new trial, or take the next one in line; the draw is stored whole before anything else."""
        trial = self._study.ask()
        reach("optimizer.asked")
        return self._completed(trial)

    @_changing
    def running(self) -> list[Draw]:
        """Return the trials that were drawn and not told, by number.

        A trial that a crash left without its draw has trained nothing and is drawn now, under its number.
        """
        unfinished = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [self._completed(self._trial(trial.number)) for trial in unfinished]

    @_with_remedy
    def ended(self) -> list[Ended]:
        """Return the trials that were told, by number."""
        told = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
        return [
            Ended(
                _draw_of(trial.number, trial.user_attrs, trial.datetime_start),
                score_of(trial),
                trial.state is TrialState.PRUNED,
                trial.user_attrs.get(_REASON),
                dict(trial.intermediate_values),
                trial.datetime_complete.astimezone(),
                dict(zip(self._objectives, trial.values or (), strict=False)),
                values_by_epoch(trial),
            )
            for trial in told
            if DRAW in trial.user_attrs and trial.datetime_complete is not None
        ]

    @_changing
    def enqueue(
        self,
        values: Mapping[str, Value],
        request: str,
        training_seed: int | None = None,
        finalist_of: int | None = None,
    ) -> int:
        """Put a configuration in line, which later calls of `ask` return first; return its number.

        Harmless when repeated: a request has one trial.

        Args:
            values: a value for each declared parameter.
            request: identity of the request for it.
            training_seed: seed of its training; None for the usual one.
            finalist_of: number of the trial whose configuration it repeats as a finalist.
        """
        draw = {"stage": self.stage.name, "values": dict(values), "request": request, "training_seed": training_seed}
        if finalist_of is not None:
            draw["finalist_of"] = finalist_of
        while (number := self._number_of(request)) is None:
            # In one transaction: no crash leaves it in line without what it is.
            self._study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={DRAW: draw}))
        return number

    @property
    @_with_remedy
    def queued(self) -> int:
        """How many configurations wait in line."""
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    @property
    def trial_count(self) -> int:
        """How many trials were ever drawn."""
        return len(self._study.get_trials(deepcopy=False))

    @_changing
    def report(self, number: int, epoch: int, value: float, values: Mapping[str, float] | None = None) -> None:
        """Store the objective measured at an epoch; a second value for the epoch replaces the first.

        Args:
            value: the score that ranks running trainings.
            values: each of several objectives by name.
        """
        frozen = self._frozen(number)
        if values:
            remember_values(self._trial(number), epoch, values)
        if frozen.intermediate_values.get(epoch) != value:
            # Trial.report would silently ignore the second value, and raise where there are several objectives.
            self._study._storage.set_trial_intermediate_value(frozen._trial_id, epoch, value)

    @_changing
    def tell_complete(
        self, number: int, value: float, infeasible_because: str | None, values: Mapping[str, float] | None = None
    ) -> None:
        """Finish a trial with its measured value; one that failed its gate never wins. Harmless when repeated.

        Args:
            value: the objective, or the score that ranks the trial where there are several.
            infeasible_because: why it must not win.
            values: each of several objectives by name.
        """
        if self._frozen(number).state.is_finished():
            return
        if infeasible_because is not None:
            trial = self._trial(number)
            trial.set_user_attr(_REASON, infeasible_because)
            if _GATE not in trial.constraints:
                trial.set_constraint(_GATE, 1.0)
        if self._objectives:
            assert values is not None, "a study of several objectives is told all of them"
            self._trial(number).set_user_attr(SCORE, value)
            self._study.tell(number, [values[name] for name in self._objectives])
        else:
            self._study.tell(number, value)

    @_changing
    def tell_failed(self, number: int, reason: str) -> None:
        """Finish a trial that has no value. Harmless when repeated."""
        if self._frozen(number).state.is_finished():
            return
        self._trial(number).set_user_attr(_REASON, reason)
        self._study.tell(number, state=TrialState.FAIL)

    @_changing
    def tell_pruned(self, number: int, reason: str) -> None:
        """Finish a trial that was stopped as losing; what it reached is its curve. Harmless when repeated."""
        if self._frozen(number).state.is_finished():
            return
        self._trial(number).set_user_attr(_REASON, reason)
        self._study.tell(number, state=TrialState.PRUNED)

    @_with_remedy
    def peers(self) -> list[Curve]:
        """Return the curves that a running trial is compared with: of measured trials that passed their gate, and of
        stopped ones."""
        told = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return [curve for trial in told if not is_infeasible(trial) and (curve := curve_of(trial)) is not None]

    def _completed(self, trial: Trial) -> Draw:
        """Finish what a crash may have cut short at any point: the stored draw, then each parameter."""
        if DRAW not in trial.user_attrs:
            values = self._sampler.draw(self._study, self._frozen(trial.number))
            trial.set_user_attr(DRAW, {"stage": self.stage.name, "values": values})
            reach("optimizer.draw_stored")
        values = trial.user_attrs[DRAW]["values"]
        for name, distribution in self._sampler.distributions.items():
            if not _contains(distribution, values[name]):
                continue  # it was pinned when it was drawn, and stays out of the model
            match distribution:
                case CategoricalDistribution():
                    trial.suggest_categorical(name, distribution.choices)
                case FloatDistribution():
                    step = distribution.step
                    trial.suggest_float(name, distribution.low, distribution.high, step=step, log=distribution.log)
                case IntDistribution():
                    trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
        return _draw_of(trial.number, trial.user_attrs, trial.datetime_start)

    def _number_of(self, request: str) -> int | None:
        trials = self._study.get_trials(deepcopy=False)
        return next((t.number for t in trials if t.user_attrs.get(DRAW, {}).get("request") == request), None)

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._frozen(number)._trial_id)


def _contains(distribution: BaseDistribution, value: Value) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:
        return False


def _draw_of(number: int, attributes: Mapping[str, Any], started: datetime | None) -> Draw:
    assert started is not None, "a trial that was asked for has started"
    stored = attributes[DRAW]
    return Draw(
        number,
        stored["values"],
        stored["stage"],
        started.astimezone(),
        enqueued="request" in stored,
        training_seed=stored.get("training_seed"),
        finalist_of=stored.get("finalist_of"),
    )


def _check_owner(study: optuna.Study, storage_url: str, folder_id: str) -> None:
    owner = study.user_attrs.get(OWNER)
    if owner is None:
        if study.get_trials(deepcopy=False):
            raise StudyMismatchError(
                f"{storage_url} holds a study {study.study_name!r} that no study folder of ours made; choose another "
                "--study-name"
            )
        study.set_user_attr(OWNER, folder_id)
    elif owner != folder_id:
        raise StudyMismatchError(
            f"{storage_url}: study {study.study_name!r} belongs to folder {owner}, not to {folder_id}; choose another "
            "--study-name, or the --output-dir it was made with"
        )


def _check_space(study: optuna.Study, attribute: str, declared: dict[str, str]) -> None:
    """Refuse other parameters, before Optuna does so in the middle of a trial, and other rules.

    Args:
        attribute: where the study keeps what it was made with.
        declared: each part of the space by name.
    """
    known: dict[str, str] | None = study.user_attrs.get(attribute)
    if known is None:
        study.set_user_attr(attribute, declared)
        return
    changed = [
        f"{name}: {known.get(name, 'absent')} -> {declared.get(name, 'absent')}"
        for name in sorted(known.keys() | declared.keys())
        if known.get(name) != declared.get(name)
    ]
    if changed:
        raise StudyMismatchError(
            f"study {study.study_name!r} was made with another search space ({'; '.join(changed)}); use that one, or "
            "another --study-name and --output-dir"
        )
