"""Desired evaluators against running ones. One process per trial, forked from a server that has imported everything
heavy once; the manager itself stays without torch.

The study folder is the truth: events and messages from evaluators only bring the next sweep forward.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

from evaluator_daemon.folder import look_at, read_or_none
from evaluator_daemon.job import Job, find_job, read_run, study_folder
from evaluator_daemon.process import PRELOADED, run_evaluator_process, wake_on_news
from evaluator_daemon.settings import EvaluatorSettings
from evaluator_daemon.sweep import SETTLED, TrialView, back_off_s, is_over, open_files, wanted_trials
from evaluator_daemon.watcher import FolderWatch
from shared.errors import CheckpointError, ContractError, LabError, ResourceError, SettingsError, StudyMismatchError
from shared.failpoints import reach
from shared.files import sweep_temp_files, write_model
from shared.layout import RUN, StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.logs import log_change, set_up_logs, tear_down_logs
from shared.safetensors_file import read_header
from shared.schemas import (
    ActiveEvaluator,
    CheckpointRecord,
    EvaluationState,
    EvaluatorManagerState,
    Metrics,
    QuarantinedCheckpoint,
)
from shared.service import Service
from shared.settings import LoadedSettings

MAX_EVALUATORS = 2
"""One for the trial in training and one for the trial before it; more would only take turns on one device."""
STOP_TIMEOUT_S = 20.0
WAKING_NAMES = ("trial_*", RUN)

_log = logging.getLogger(__name__)


@dataclass
class RunningEvaluator:
    """One evaluator process."""

    process: ForkServerProcess
    messages: Connection
    started: datetime
    handled: bool = False  # asked to end


@dataclass
class History:
    """What the manager remembers of a trial between its evaluators."""

    failures: int = 0
    not_before_s: float = 0.0  # monotonic
    last_exit: int | None = None
    passed: bool = False  # with --once: has had its turn


def run_manager(loaded: LoadedSettings[EvaluatorSettings], *, once: bool, exit_when_finished: bool) -> None:
    """Watch a study folder until told to stop; see `Manager`.

    Raises:
        AlreadyRunningError: another manager watches this folder.
        Stopped: by a signal.
    """
    study = study_folder(loaded.settings, make=not once)
    with FileLock(study.manager_lock):
        set_up_logs(study.manager_log)
        sweep_temp_files(study.root)
        service = Service()
        watch = FolderWatch(study.root, WAKING_NAMES, service.wake)
        manager = Manager(loaded, study, service, once=once, exit_when_finished=exit_when_finished, watch=watch)
        log_change(_log, "manager started", pid=os.getpid(), folder=study.root)
        try:
            service.run(manager.tick, 1.0 if once else loaded.settings.check_interval)
        finally:
            watch.close()
            manager.close()
            log_change(_log, "manager stopped")
            tear_down_logs()
    if manager.failure is not None:
        raise manager.failure


class Manager:
    """One sweep per tick: look at every trial, reap, spawn, write the view of it all."""

    def __init__(
        self,
        loaded: LoadedSettings[EvaluatorSettings],
        study: StudyLayout,
        service: Service,
        *,
        once: bool,
        exit_when_finished: bool,
        watch: FolderWatch,
    ) -> None:
        self.failure: LabError | None = None
        self._loaded = loaded
        self._study = study
        self._service = service
        self._once = once
        self._exit_when_finished = exit_when_finished
        self._watch = watch
        self._started = datetime.now().astimezone()
        self._job: Job | None = None
        self._said_waiting = False
        self._running: dict[str, RunningEvaluator] = {}
        self._histories: dict[str, History] = {}
        self._records = RecordCache()
        self._said: dict[str, set[tuple[str, str | None, str]]] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))

    def tick(self) -> None:
        """Sweep once."""
        self._watch.check()
        if not self._find_job():
            return
        assert self._job is not None
        trials = self._look()
        self._reap(trials)
        for trial in trials:
            self._say_news(trial)
        self._start_and_stop(trials)
        self._write_state(trials, "running")
        if not self._running and self._is_done(trials):
            self._service.stop()

    def close(self) -> None:
        """End every evaluator and say in the state file that this manager has stopped."""
        for running in self._running.values():
            _terminate(running)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for running in self._running.values():
            running.process.join(max(0.0, deadline - time.monotonic()))
            if running.process.is_alive():
                running.process.kill()
                running.process.join()
        self._running.clear()
        if self._job is not None or self._said_waiting:
            self._write_state(self._look() if self._job else [], "stopped")

    # --------------------------------------------------------------------------------------------------------- sweep

    def _find_job(self) -> bool:
        """Know the plan, or wait for it."""
        if self._job is None:
            self._job = find_job(self._loaded, self._study)
            if self._job is None and self._once:
                raise SettingsError(
                    "--base-model", None, f"there is no {self._study.run}; pass --base-model and --prompts"
                )
            if self._job is None and not self._said_waiting:
                self._said_waiting = True
                log_change(_log, f"waiting for {self._study.run}")
            if self._job is None:
                self._write_state([], "waiting")
                return False
            log_change(
                _log, "plan", samples=self._job.plan.num_samples, device=self._job.device, dtype=self._job.plan.dtype
            )
        run = read_run(self._study)
        if run is not None and run.plan != self._job.plan:
            raise StudyMismatchError(f"{self._study.run} holds another plan than the one evaluated here; start again")
        return True

    def _look(self) -> list[TrialView]:
        assert self._job is not None
        now_s, plan_hash = time.time(), self._job.plan.digest()
        views = []
        for trial in self._study.list_trials():
            with contextlib.suppress(FileNotFoundError):  # somebody moved the folder away just now
                views.append(look_at(trial, self._records.of(trial), plan_hash, now_s))
        return views

    def _reap(self, trials: list[TrialView]) -> None:
        """Collect ended evaluators; one that failed is started again only after a while."""
        for name, running in list(self._running.items()):
            while running.messages.poll():
                try:
                    running.messages.recv_bytes()
                except EOFError:
                    break
            if running.process.is_alive():
                continue
            running.process.join()
            code = running.process.exitcode
            assert code is not None
            running.messages.close()
            running.process.close()
            del self._running[name]
            history = self._histories[name]
            history.last_exit, history.passed = code, True
            history.failures = 0 if code == 0 or running.handled else history.failures + 1
            history.not_before_s = time.monotonic() + back_off_s(history.failures)
            level = logging.INFO if code == 0 or running.handled else logging.WARNING
            log_change(
                _log, "evaluator ended", level=level, trial=name, exit=code, retry_in_s=back_off_s(history.failures)
            )
            if self._once and code not in (0,) and not running.handled:
                self._fail(name, code, history)

    def _start_and_stop(self, trials: list[TrialView]) -> None:
        assert self._job is not None
        wanted = [
            t for t in wanted_trials(trials, self._job.idle_timeout_s, once=self._once) if self._may_start(t.name)
        ]
        wanted = wanted[:MAX_EVALUATORS]
        for trial in trials:
            idle = trial.name in self._running and not open_files(trial)
            crowded_out = trial.name not in {t.name for t in wanted} and len(wanted) == MAX_EVALUATORS
            if idle and crowded_out:
                _terminate(self._running[trial.name])
        for trial in wanted:
            if trial.name not in self._running and len(self._running) < MAX_EVALUATORS and not self._service.stopping:
                self._start(trial.name)

    def _may_start(self, name: str) -> bool:
        history = self._histories.setdefault(name, History())
        if name in self._running:
            return True
        return not (self._once and history.passed) and time.monotonic() >= history.not_before_s

    def _start(self, name: str) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=run_evaluator_process,
            name=f"evaluator {name}",
            args=(self._job, self._study.root / name, not self._once, self._histories[name].last_exit, theirs),
        )
        process.start()
        theirs.close()
        reach("manager.evaluator_started")
        self._running[name] = RunningEvaluator(process, ours, datetime.now().astimezone())
        watcher = threading.Thread(
            target=wake_on_news, args=(ours, process.sentinel, self._service.wake), name=f"news of {name}", daemon=True
        )
        watcher.start()
        log_change(_log, "evaluator started", trial=name, pid=process.pid)

    def _is_done(self, trials: list[TrialView]) -> bool:
        assert self._job is not None
        if self._once:
            return not [t for t in wanted_trials(trials, 0.0, once=True) if self._may_start(t.name)]
        if not self._exit_when_finished:
            return False
        over = all(is_over(trial, self._job.idle_timeout_s) and not open_files(trial) for trial in trials)
        run = read_run(self._study)
        return over and (run.status == "finished" if run is not None else bool(trials))

    def _fail(self, name: str, code: int, history: History) -> None:
        """With --once: a crash is a strike, so it is tried again; anything else ends the run with the same code."""
        if code < 0 and history.failures < 4:
            history.passed, history.not_before_s = False, 0.0
            return
        log = TrialLayout(self._study.root / name).evaluation_log
        message = f"the evaluator of {name} ended with exit status {code}; {log} says why"
        self.failure = {2: StudyMismatchError, 3: ContractError}.get(code, ResourceError)(message)

    # ------------------------------------------------------------------------------------------------- what people see

    def _say_news(self, trial: TrialView) -> None:
        """One line for each checkpoint that was recorded, quarantined or found truncated since the last sweep."""
        told = self._said.get(trial.name)
        news = {_verdict(record): record for record in trial.records if record.status in SETTLED}
        self._said[trial.name] = set(news)
        if told is None:
            log_change(_log, "trial seen", trial=trial.name, state=trial.state, checkpoints=len(trial.files))
            return
        evaluations = TrialLayout(self._study.root / trial.name).evaluations
        for record in (record for verdict, record in news.items() if verdict not in told):
            if record.status == "recorded":
                _say_recorded(
                    trial.name, record, read_or_none(evaluations.checkpoint(record.checkpoint).metrics, Metrics)
                )
            else:
                why = record.quarantine.reason if record.quarantine else "its writer has gone"
                fields = {"trial": trial.name, "checkpoint": record.checkpoint, "reason": why}
                log_change(_log, f"checkpoint {record.status}", level=logging.WARNING, **fields)

    def _write_state(self, trials: list[TrialView], status: Literal["waiting", "running", "stopped"]) -> None:
        by_name = {trial.name: trial for trial in trials}
        waiting = [self._study.root / t.name / f"{f.name}.safetensors" for t in trials for f in open_files(t)]
        quarantined = [(t.name, record) for t in trials for record in t.records if record.quarantine is not None]
        state = EvaluatorManagerState(
            status=status,
            host=os.uname().nodename,
            pid=os.getpid(),
            started=self._started,
            heartbeat=datetime.now().astimezone(),
            device=self._job.device if self._job else self._loaded.settings.device,
            gpu_policy="share",
            waiting_checkpoints=sum(_is_complete(path) for path in waiting),
            evaluators=tuple(_active(name, running, by_name.get(name)) for name, running in self._running.items()),
            quarantine=tuple(_quarantined(name, record) for name, record in quarantined),
        )
        write_model(self._study.manager_state, state)
        self._service.status(f"{len(self._running)} evaluators, {state.waiting_checkpoints} checkpoints waiting")


class RecordCache:
    """Each trial's records, read again only when their file has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], tuple[CheckpointRecord, ...]]] = {}

    def of(self, trial: TrialLayout) -> tuple[CheckpointRecord, ...]:
        """Return the records; none where the evaluator has yet to write, or to rebuild, its state."""
        path = trial.evaluations.state
        try:
            status = path.stat()
        except FileNotFoundError:
            return ()
        stamp = (status.st_mtime_ns, status.st_ino)
        if path not in self._known or self._known[path][0] != stamp:
            state = read_or_none(path, EvaluationState)
            self._known[path] = (stamp, state.checkpoints if state else ())
        return self._known[path][1]


def _terminate(running: RunningEvaluator) -> None:
    if not running.handled:
        running.handled = True
        running.process.terminate()


def _verdict(record: CheckpointRecord) -> tuple[str, str | None, str]:
    return record.checkpoint, record.checkpoint_sha256, record.status


def _say_recorded(trial: str, record: CheckpointRecord, metrics: Metrics | None) -> None:
    if metrics is None:
        log_change(_log, "checkpoint recorded", trial=trial, checkpoint=record.checkpoint)
        return
    log_change(
        _log,
        "checkpoint recorded",
        trial=trial,
        checkpoint=record.checkpoint,
        epoch=metrics.epoch,
        brightness=metrics.metrics["brightness"].value,
        contrast=metrics.metrics["contrast"].value,
        saturation=metrics.metrics["saturation"].value,
        score=metrics.scores["combined_score"].value,
        feasible=metrics.gate.feasible,
        seconds=metrics.seconds.total,
    )


def _active(name: str, running: RunningEvaluator, trial: TrialView | None) -> ActiveEvaluator:
    in_hand = next((r.checkpoint for r in (trial.records if trial else ()) if r.status == "evaluating"), None)
    assert running.process.pid is not None
    activity: Literal["evaluating", "waiting"] = "evaluating" if in_hand else "waiting"
    return ActiveEvaluator(
        trial_name=name, pid=running.process.pid, started=running.started, activity=activity, checkpoint=in_hand
    )


def _quarantined(trial: str, record: CheckpointRecord) -> QuarantinedCheckpoint:
    assert record.quarantine is not None
    found = record.quarantine
    return QuarantinedCheckpoint(
        trial_name=trial, checkpoint=record.checkpoint, code=found.code, reason=found.reason, since=found.since
    )


def _is_complete(path: Path) -> bool:
    try:
        read_header(path, path.parent)
    except CheckpointError:
        return False
    return True
