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

from evaluator_daemon.commands import lift, refusal_of
from evaluator_daemon.folder import look_at, read_or_none
from evaluator_daemon.gpu_policy import policy_of
from evaluator_daemon.job import Job, find_job, read_run, study_folder
from evaluator_daemon.news import News
from evaluator_daemon.process import DEFERRED, PRELOADED, run_evaluator_process, wake_on_news
from evaluator_daemon.settings import EvaluatorSettings
from evaluator_daemon.sweep import TrialView, back_off_s, is_over, open_files, wanted_trials
from evaluator_daemon.watcher import FolderWatch
from shared.errors import (
    AlreadyRunningError,
    CheckpointError,
    ContractError,
    LabError,
    ResourceError,
    SettingsError,
    StudyMismatchError,
    UserError,
)
from shared.failpoints import reach
from shared.files import sweep_temp_files, write_model
from shared.layout import RUN, StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.logs import log_change, set_up_logs, tear_down_logs
from shared.requests import RequestFolder
from shared.safetensors_file import read_header
from shared.schemas import (
    ActiveEvaluator,
    CheckpointRecord,
    EvaluationState,
    EvaluatorManagerState,
    QuarantinedCheckpoint,
    Retry,
)
from shared.service import Service
from shared.settings import LoadedSettings

MAX_EVALUATORS = 2
"""One for the trial in training and one for the trial before it; more would only take turns on one device."""
STOP_TIMEOUT_S = 20.0
OPTIMIZER_GRACE_S = 30.0
"""With --exit-when-finished: how long a study that was finished before we came may still be extended."""
LAST_WORDS_S = 2.0
WAKING_NAMES = ("trial_*", RUN)
WAKING_REQUESTS = ("*-*.json",)  # not our own answers

_log = logging.getLogger(__name__)


@dataclass
class RunningEvaluator:
    """One evaluator process."""

    process: ForkServerProcess
    messages: Connection
    started: datetime
    handled: bool = False  # asked to end
    deferred: bool = False  # others need the device now


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
        requests = RequestFolder(study, "evaluator")
        requests.tidy(datetime.now().astimezone())
        service = Service()
        watch = FolderWatch(study.root, WAKING_NAMES, service.wake)
        request_watch = FolderWatch(requests.path, WAKING_REQUESTS, service.wake)
        manager = Manager(loaded, study, service, once=once, exit_when_finished=exit_when_finished, watch=watch)
        log_change(_log, "manager started", pid=os.getpid(), folder=study.root)
        try:
            service.run(manager.tick, 1.0 if once else loaded.settings.check_interval)
        finally:
            watch.close()
            request_watch.close()
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
        self._requests = RequestFolder(study, "evaluator")
        self._started = datetime.now().astimezone()
        self._started_s = time.monotonic()
        self._saw_optimizer = False
        self._job: Job | None = None
        self._said_waiting = False
        self._running: dict[str, RunningEvaluator] = {}
        self._histories: dict[str, History] = {}
        self._records = RecordCache()
        self._news = News(study)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))

    def tick(self) -> None:
        """Sweep once."""
        self._watch.check()
        self._serve_requests()
        if not self._find_job():
            return
        assert self._job is not None
        trials = self._look()
        self._reap(trials)
        for trial in trials:
            self._news.say(trial)
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

    def _serve_requests(self) -> None:
        """Carry out what people ask for; what an evaluator in our way has to make room for first stays pending."""
        for request in self._requests.pending():
            if not isinstance(request.command, Retry):
                self._requests.refuse(request, refusal_of(request.command))
                continue
            name = request.command.trial_name
            try:
                result = lift(self._study, request.command)
            except AlreadyRunningError:
                if name in self._running:
                    _terminate(self._running[name])
            except (ContractError, UserError) as error:
                log_change(_log, "request refused", level=logging.WARNING, id=request.id, reason=error)
                self._requests.refuse(request, str(error))
            else:
                log_change(_log, "request", kind="retry", id=request.id, trial=name, checkpoints=result["checkpoints"])
                self._histories[name] = History()
                self._requests.accept(request, result)

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
                    running.deferred = running.messages.recv_bytes() == DEFERRED
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
        if run is None:
            return over and bool(trials)
        # Whoever extends a finished study starts both daemons at once; the optimizer needs a while to say "running".
        self._saw_optimizer |= FileLock.is_held(self._study.optimizer_lock)
        waited = self._saw_optimizer or time.monotonic() - self._started_s >= OPTIMIZER_GRACE_S
        return over and run.status == "finished" and waited and self._optimizer_has_gone()

    def _optimizer_has_gone(self) -> bool:
        """Wait a moment for one that has only its last words left: a whole check interval would be long for that."""
        deadline = time.monotonic() + LAST_WORDS_S
        while held := FileLock.is_held(self._study.optimizer_lock):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        return not held

    def _fail(self, name: str, code: int, history: History) -> None:
        """With --once: a crash is a strike, so it is tried again; anything else ends the run with the same code."""
        if code < 0 and history.failures < 4:
            history.passed, history.not_before_s = False, 0.0
            return
        log = TrialLayout(self._study.root / name).evaluation_log
        message = f"the evaluator of {name} ended with exit status {code}; {log} says why"
        self.failure = {2: StudyMismatchError, 3: ContractError}.get(code, ResourceError)(message)

    # ------------------------------------------------------------------------------------------------- what people see

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
            gpu_policy=policy_of(self._study, self._loaded.settings.gpu_policy),
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


def _active(name: str, running: RunningEvaluator, trial: TrialView | None) -> ActiveEvaluator:
    in_hand = next((r.checkpoint for r in (trial.records if trial else ()) if r.status == "evaluating"), None)
    assert running.process.pid is not None
    activity: Literal["evaluating", "waiting", "deferred"]
    activity = "evaluating" if in_hand else "deferred" if running.deferred else "waiting"
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
