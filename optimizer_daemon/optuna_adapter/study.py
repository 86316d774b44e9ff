"""The Optuna study behind a study folder: ask, report, tell, resume. One process writes: the optimizer daemon."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from optimizer_daemon.optuna_adapter.sampler import DRAW, FeasibleSampler
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.space import SearchSpace
from shared.errors import ResourceError, SettingsError, StudyMismatchError
from shared.failpoints import reach

BUSY_TIMEOUT_S = 60  # another reader of the database may hold it that long

_OWNER = "owner"
_SPACE = "search_space"
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
    """

    number: int
    values: dict[str, Value]
    stage: str | None
    drawn: datetime


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


class TuningStudy:
    """One Optuna study. Any method raises ResourceError when the database fails.

    `open` continues the study of that name in that storage, or makes it.
    """

    def __init__(self, study: optuna.Study, sampler: FeasibleSampler, stage: str | None) -> None:
        self._study = study
        self._sampler = sampler
        self._stage = stage

    @classmethod
    def open(
        cls,
        name: str,
        storage_url: str,
        space: SearchSpace,
        *,
        seed: int,
        folder_id: str,
        pinned: Mapping[str, Value] | None = None,
        stage: str | None = None,
    ) -> Self:
        """Open or make the study.

        Args:
            name: the study's name.
            storage_url: a SQLAlchemy URL.
            space: what is drawn from; its declared parameters must be those the study was made with.
            seed: seed of the draws.
            folder_id: identity of the study folder, which owns the study.
            pinned: parameters of `space` that have one value in this run and stay out of Optuna's model.
            stage: recorded with every draw of this run.

        Raises:
            StudyMismatchError: the study belongs to another folder or has other parameters.
            SettingsError: the storage cannot be opened.
        """
        storage = _open_storage(storage_url)
        sampler = FeasibleSampler(space, seed, pinned or {})
        study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, direction="minimize", load_if_exists=True
        )
        _check_owner(study, storage_url, folder_id)
        _check_space(study, {known: str(parameter) for known, parameter in space.parameters.items()})
        return cls(study, sampler, stage)

    @_with_remedy
    def ask(self) -> Draw:
        """Draw a new trial; the draw is stored whole before anything else."""
        trial = self._study.ask()
        reach("optimizer.asked")
        return self._completed(trial)

    @_with_remedy
    def running(self) -> list[Draw]:
        """Return the trials that were drawn and not told, by number.

        A trial that a crash left without its draw has trained nothing and is drawn now, under its number.
        """
        unfinished = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [self._completed(self._trial(trial.number)) for trial in unfinished]

    @property
    def trial_count(self) -> int:
        """How many trials were ever drawn."""
        return len(self._study.get_trials(deepcopy=False))

    @_with_remedy
    def report(self, number: int, epoch: int, value: float) -> None:
        """Store the objective measured at an epoch; a second value for the epoch replaces the first."""
        frozen = self._frozen(number)
        if frozen.intermediate_values.get(epoch) != value:
            # Trial.report would silently ignore the second value.
            self._study._storage.set_trial_intermediate_value(frozen._trial_id, epoch, value)

    @_with_remedy
    def tell_complete(self, number: int, value: float, infeasible_because: str | None) -> None:
        """Finish a trial with its measured value; one that failed its gate never wins. Harmless when repeated."""
        if self._frozen(number).state.is_finished():
            return
        if infeasible_because is not None:
            trial = self._trial(number)
            trial.set_user_attr(_REASON, infeasible_because)
            if _GATE not in trial.constraints:
                trial.set_constraint(_GATE, 1.0)
        self._study.tell(number, value)

    @_with_remedy
    def tell_failed(self, number: int, reason: str) -> None:
        """Finish a trial that has no value. Harmless when repeated."""
        if self._frozen(number).state.is_finished():
            return
        self._trial(number).set_user_attr(_REASON, reason)
        self._study.tell(number, state=TrialState.FAIL)

    def _completed(self, trial: Trial) -> Draw:
        """Finish what a crash may have cut short at any point: the stored draw, then each parameter."""
        if DRAW not in trial.user_attrs:
            values = self._sampler.draw(self._study, self._frozen(trial.number))
            trial.set_user_attr(DRAW, {"stage": self._stage, "values": values})
            reach("optimizer.draw_stored")
        for name, distribution in self._sampler.distributions.items():
            match distribution:
                case CategoricalDistribution():
                    trial.suggest_categorical(name, distribution.choices)
                case FloatDistribution():
                    step = distribution.step
                    trial.suggest_float(name, distribution.low, distribution.high, step=step, log=distribution.log)
                case IntDistribution():
                    trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
        started = trial.datetime_start
        assert started is not None, "a trial that was asked for has started"
        stored = trial.user_attrs[DRAW]
        return Draw(trial.number, stored["values"], stored["stage"], started.astimezone())

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._frozen(number)._trial_id)


def _open_storage(storage_url: str) -> RDBStorage:
    try:
        url = make_url(storage_url)
        sqlite = url.get_backend_name() == "sqlite"
        if sqlite and url.database:
            _use_write_ahead_log(Path(url.database))
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}} if sqlite else {}
        return RDBStorage(storage_url, engine_kwargs=options)
    except RuntimeError as error:  # Optuna's word for a database of another version
        raise StudyMismatchError(
            f"{storage_url} was made by another version of Optuna ({error}); run `optuna storage upgrade --storage "
            f"{storage_url}`"
        ) from error
    except (ValueError, ImportError, sqlite3.Error, SQLAlchemyError) as error:
        raise SettingsError(
            "--storage", storage_url, f"name a database that opens, such as sqlite:////data/study.db ({error})"
        ) from error


def _use_write_ahead_log(file: Path) -> None:
    """Let readers such as optuna-dashboard and our writes not wait for each other; the mode stays with the file."""
    with contextlib.closing(sqlite3.connect(file, timeout=BUSY_TIMEOUT_S)) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise ResourceError(f"{file}: SQLite offers only the journal mode {mode!r} there; put it on a local disk")


def _check_owner(study: optuna.Study, storage_url: str, folder_id: str) -> None:
    owner = study.user_attrs.get(_OWNER)
    if owner is None:
        if study.get_trials(deepcopy=False):
            raise StudyMismatchError(
                f"{storage_url} holds a study {study.study_name!r} that no study folder of ours made; choose another "
                "--study-name"
            )
        study.set_user_attr(_OWNER, folder_id)
    elif owner != folder_id:
        raise StudyMismatchError(
            f"{storage_url}: study {study.study_name!r} belongs to folder {owner}, not to {folder_id}; choose another "
            "--study-name, or the --output-dir it was made with"
        )


def _check_space(study: optuna.Study, declared: dict[str, str]) -> None:
    """Refuse other parameters before Optuna does so in the middle of a trial."""
    known: dict[str, str] | None = study.user_attrs.get(_SPACE)
    if known is None:
        study.set_user_attr(_SPACE, declared)
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
