"""Reads a study folder for people who look: nothing is written, and what is damaged is named, never a failure.

A look costs a few stats for each trial: a document is read again only when its file has changed, so that a view that is
refreshed every few seconds stays cheap at hundreds of finished trials.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from evaluator_daemon.gpu_probe import NVIDIA_SMI, GpuProbe
from evaluator_daemon.overview import (
    Best,
    Direction,
    EvaluatorAtWork,
    Objective,
    Overview,
    Point,
    Queue,
    Training,
    TrialOverview,
    Trouble,
    best_point,
    epochs_done,
    in_order,
    is_over,
    latest,
    seconds_left,
    sorted_curve,
    winner,
)
from evaluator_daemon.sweep import SETTLED
from shared.errors import LabError, ResourceError
from shared.files import read_model
from shared.layout import StudyLayout, TrialLayout, checkpoint_epoch, expected_checkpoints
from shared.locks import FileLock
from shared.progress_bar import Progress, parse_bar, parse_preparation
from shared.schemas import (
    CheckpointRecord,
    EvaluationState,
    EvaluationSummary,
    EvaluatorManagerState,
    Metrics,
    Run,
    TrialParams,
    TrialState,
    VersionedFile,
)

LOG_TAIL_BYTES = 65536

F = TypeVar("F", bound=VersionedFile)
T = TypeVar("T")
Stamp = tuple[int, int, int]

_LOG_TROUBLE = re.compile(r"(\S+) (?:WARNING|ERROR|CRITICAL) (.+)")


class StudyReader:
    """Looks at one study folder again and again.

    Args:
        study: the folder; it may be empty.
        clock: monotonic time in seconds.
        nvidia_smi: how to ask for the GPUs.
    """

    def __init__(
        self,
        study: StudyLayout,
        *,
        clock: Callable[[], float] = time.monotonic,
        nvidia_smi: tuple[str, ...] = NVIDIA_SMI,
    ) -> None:
        self._study = study
        self._files = FileCache()
        self._gpus = GpuProbe(clock, nvidia_smi)
        self._direction: Direction | None = None

    @property
    def files_read(self) -> int:
        """How many files were read so far, as against those that had not changed."""
        return self._files.read_count

    def look(self, now: datetime) -> Overview:
        """Return the study as its files show it.

        Args:
            now: with offset.
        """
        study, files = self._study, self._files
        files.unreadable.clear()
        run = files.document(study.run, Run)
        manager = files.document(study.manager_state, EvaluatorManagerState)
        optimizer_alive, evaluator_alive = self._is_held(study.optimizer_lock), self._is_held(study.manager_lock)
        folders = study.list_trials()
        objective = self._objective(run, folders)
        reader = _TrialReader(files, run, objective, self._is_held)
        seen = [reader.look(trial) for trial in folders]
        trials = in_order((trial for trial, _ in seen), objective)
        target = _target(run) if run is not None else None
        quarantined = [trouble for _, told in seen for trouble in told.quarantined]
        best = _best(study, trials, objective)
        won = winner(trials, objective)
        return Overview(
            time=now,
            folder=str(study.root),
            study=run.study_name if run is not None else study.root.name,
            status=self._status(run, bool(folders)),
            optimizer_alive=optimizer_alive,
            evaluator_alive=evaluator_alive,
            manager_status=manager.status if manager is not None else None,
            device=manager.device if manager is not None else None,
            gpus=self._gpus.ask(),
            objective=objective,
            target=target,
            finished=sum(trial.state in ("complete", "pruned") for trial in trials),
            failed=sum(trial.state == "failed" for trial in trials),
            eta_s=seconds_left(trials, target, now, slots=run.slots if run is not None else 1),
            queue=_queue(trials, manager if evaluator_alive else None),
            quarantined=len(quarantined),
            last_quarantine=latest(quarantined),
            last_error=latest([*(trouble for _, told in seen for trouble in told.errors), *self._logged()]),
            best=best,
            winner=won.name if won is not None else None,
            trials=trials,
            unreadable=tuple(files.unreadable),
        )

    def _status(self, run: Run | None, has_trials: bool) -> str:
        if run is not None:
            return run.status
        if not self._study.root.is_dir():
            return "gone"
        if os.path.lexists(self._study.run):
            return "unreadable"
        return "no run.json" if has_trials else "waiting for run.json"

    def _objective(self, run: Run | None, trials: Iterable[TrialLayout]) -> Objective:
        """The plan names the score; its direction stands with every measurement of it."""
        name = run.plan.scoring.objective if run is not None and run.plan is not None else Objective().name
        if self._direction is None:
            self._direction = self._measured_direction(name, trials)
        return Objective(name, self._direction or Objective().direction)

    def _measured_direction(self, name: str, trials: Iterable[TrialLayout]) -> Direction | None:
        for trial in trials:
            summary = self._files.document(trial.evaluations.summary, EvaluationSummary)
            for checkpoint in summary.checkpoints if summary is not None else ():
                metrics = self._files.document(trial.evaluations.checkpoint(checkpoint).metrics, Metrics)
                if metrics is not None and name in metrics.scores:
                    return metrics.scores[name].direction
                break  # one of each trial will do
        return None

    def _is_held(self, lock: Path) -> bool | None:
        try:
            return FileLock.is_held(lock)
        except ResourceError as error:
            self._files.note(lock, str(error))
            return None

    def _logged(self) -> Iterator[Trouble]:
        for log in (self._study.manager_log, self._study.optimizer_log):
            if (trouble := self._files.derived(log, _last_trouble)) is not None:
                yield trouble


class FileCache:
    """What files hold, read again only when their modification time, size or inode has changed."""

    def __init__(self) -> None:
        self.unreadable: list[str] = []
        self.read_count = 0
        self._known: dict[tuple[Path, object], tuple[Stamp, Any, str]] = {}

    def document(self, path: Path, model: type[F]) -> F | None:
        """Return a document; None when it is not there, or damaged: that is noted in `unreadable`."""
        return self._get(path, model, lambda: read_model(path, model))

    def derived(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """Return what `read` makes of a file; None when it is not there, or unreadable."""
        return self._get(path, read, lambda: read(path))

    def note(self, path: Path, reason: str) -> None:
        """Remember once that something of a file cannot be known."""
        sentence = reason if str(path) in reason else f"{path}: {reason}"
        if sentence not in self.unreadable:
            self.unreadable.append(sentence)

    def _get(self, path: Path, kind: object, read: Callable[[], T]) -> T | None:
        key = (path, kind)
        try:
            status = path.stat()
        except FileNotFoundError:
            self._known.pop(key, None)
            return None
        except OSError as error:
            self.note(path, f"could not be read ({error.strerror})")
            return None
        # Before the content: what is written meanwhile makes the next look read again.
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if key not in self._known or self._known[key][0] != stamp:
            self._known[key] = (stamp, *self._read(read))
        _, content, reason = self._known[key]
        if reason:
            self.note(path, reason)
        found: T | None = content
        return found

    def _read(self, read: Callable[[], T]) -> tuple[T | None, str]:
        self.read_count += 1
        try:
            return read(), ""
        except FileNotFoundError:
            return None, ""
        except LabError as error:
            return None, str(error)
        except OSError as error:
            return None, f"could not be read ({error.strerror})"


class _Told:
    """What a trial's records say about what went wrong."""

    def __init__(self) -> None:
        self.quarantined: list[Trouble] = []
        self.errors: list[Trouble] = []


class _TrialReader:
    """Reads trials under one run.json."""

    def __init__(
        self, files: FileCache, run: Run | None, objective: Objective, is_held: Callable[[Path], bool | None]
    ) -> None:
        self._files = files
        self._plan_hash = run.plan_hash if run is not None else None
        every = run.settings.get("save-every-n-epochs") if run is not None else None
        self._every = every if isinstance(every, int) and every >= 1 else None
        self._objective = objective
        self._is_held = is_held

    def look(self, trial: TrialLayout) -> tuple[TrialOverview, _Told]:
        """Return the trial and what went wrong in it."""
        files = self._files
        params, state = files.document(trial.params, TrialParams), files.document(trial.state, TrialState)
        records = files.document(trial.evaluations.state, EvaluationState)
        summary = files.document(trial.evaluations.summary, EvaluationSummary)
        name = state.state if state is not None else None
        epochs = params.max_train_epochs if params is not None else None
        standing = [path.stem for path in trial.list_checkpoints()]
        trainer_alive = False if is_over(name) else self._is_held(trial.trainer_lock)
        progress = files.derived(trial.training_log, last_progress) if trainer_alive else None
        training = _training(progress) if progress is not None else None
        saved = [checkpoint_epoch(stem, None, epochs, trial.output_name) for stem in standing]
        curve = self._curve(trial, summary, state, set(standing))
        settled = {record.checkpoint for record in _records(records) if record.status in SETTLED}
        told = _Told()
        for record in _records(records):
            _note_troubles(record, trial, told)
        if state is not None and state.state == "failed" and state.ended is not None:
            told.errors.append(Trouble(state.ended, trial.name, f"failed: {state.reason}"))
        overview = TrialOverview(
            name=trial.name,
            number=trial.number,
            state=name,
            reason=state.reason if state is not None else None,
            trainer_alive=trainer_alive,
            epochs_done=epochs_done(name, epochs, training, progress.epoch if progress else None, saved),
            epochs=epochs,
            checkpoints=len(standing),
            checkpoints_expected=expected_checkpoints(epochs, self._every) if epochs and self._every else None,
            unscored=len(set(standing) - settled),
            scoring=self._in_hand(trial, records),
            curve=curve,
            best=best_point(curve, self._objective),
            value=state.value if state is not None else None,
            feasible=state.feasible if state is not None else None,
            parameters=params.parameters if params is not None else {},
            stage=params.stage if params is not None else None,
            origin=params.origin if params is not None else "sampler",
            finalist_of=params.finalist_of if params is not None else None,
            training=training,
            started=state.started if state is not None else None,
            ended=state.ended if state is not None else None,
        )
        return overview, told

    def _curve(
        self, trial: TrialLayout, summary: EvaluationSummary | None, state: TrialState | None, standing: set[str]
    ) -> tuple[Point, ...]:
        """The scores of this plan; a redo begins anew, so while a trial is under way only those of files that stand."""
        deleted = {
            Path(name).name.removesuffix(".safetensors") for name in (state.deleted if state is not None else ())
        }
        closed = state is not None and is_over(state.state)
        points = []
        for name, entry in summary.checkpoints.items() if summary is not None else ():
            if self._plan_hash is not None and entry.plan_hash not in (None, self._plan_hash):
                continue
            if closed or name in standing or name in deleted:
                score = entry.scores.get(self._objective.name)
                points.append(Point(name, entry.epoch, score, entry.feasible))
        return sorted_curve(points)

    def _in_hand(self, trial: TrialLayout, records: EvaluationState | None) -> str | None:
        evaluating = [record.checkpoint for record in _records(records) if record.status == "evaluating"]
        return evaluating[-1] if evaluating and self._is_held(trial.evaluations.lock) else None


def last_progress(log: Path) -> Progress | None:
    """Return what the end of a training's log says about how far it is.

    Raises:
        OSError: it cannot be read.
    """
    for line in reversed(re.split(r"[\r\n]", _tail(log))):
        if progress := parse_bar(line) or parse_preparation(line):
            return progress
    return None


def _last_trouble(log: Path) -> Trouble | None:
    """Return the last line of a daemon's log that is a warning or worse."""
    for line in reversed(_tail(log).splitlines()):
        if found := _LOG_TROUBLE.fullmatch(line):
            try:
                return Trouble(datetime.fromisoformat(found[1]).astimezone(), log.name, found[2])
            except ValueError:
                continue  # somebody else's line
    return None


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _training(said: Progress) -> Training:
    return Training(said.step, said.steps, said.preparing, said.seconds_per_step, said.eta_s)


def _records(state: EvaluationState | None) -> tuple[CheckpointRecord, ...]:
    return state.checkpoints if state is not None else ()


def _note_troubles(record: CheckpointRecord, trial: TrialLayout, told: _Told) -> None:
    place = f"{trial.name} {record.checkpoint}"
    if record.quarantine is not None:
        trouble = Trouble(record.quarantine.since, place, f"{record.quarantine.code}: {record.quarantine.reason}")
        told.quarantined.append(trouble)
        told.errors.append(trouble)
    for attempt in record.attempts:
        if attempt.outcome == "strike" and attempt.ended is not None:
            told.errors.append(Trouble(attempt.ended, place, str(attempt.reason)))


def _queue(trials: Iterable[TrialOverview], manager: EvaluatorManagerState | None) -> Queue:
    """What waits; `manager` is the living manager's view."""
    trials = list(trials)
    in_hand = {trial.name: trial.scoring for trial in trials if trial.scoring is not None}
    if manager is None:
        at_work = tuple(EvaluatorAtWork(name, "evaluating", checkpoint) for name, checkpoint in in_hand.items())
        return Queue(sum(trial.unscored for trial in trials), False, 0, at_work)
    evaluators = tuple(
        EvaluatorAtWork(e.trial_name, e.activity, in_hand.get(e.trial_name) or e.checkpoint) for e in manager.evaluators
    )
    deferred = sum(evaluator.activity == "deferred" for evaluator in evaluators)
    return Queue(manager.waiting_checkpoints, True, deferred, evaluators)


def _target(run: Run) -> int | None:
    """Return how many finished trials the whole study is to have."""
    n_trials = run.settings.get("n-trials")
    if run.stage is not None:
        return run.stage.study_trials
    return n_trials if isinstance(n_trials, int) else None


def _best(study: StudyLayout, trials: Iterable[TrialOverview], objective: Objective) -> Best | None:
    by_point = {id(trial.best): trial for trial in trials if trial.best is not None}
    ordered = sorted(by_point.values(), key=lambda trial: (trial.number is None, trial.number or 0, trial.name))
    found = best_point((trial.best for trial in ordered if trial.best is not None), objective)
    if found is None or found.score is None:
        return None
    trial = TrialLayout(study.root / by_point[id(found)].name)
    file = trial.folder / f"{found.checkpoint}.safetensors"
    return Best(trial.name, file.name, found.epoch, found.score, file.exists(), file == trial.final_checkpoint)
