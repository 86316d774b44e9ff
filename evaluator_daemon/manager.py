"""Desired evaluators against running ones. One process per trial; the manager itself stays without torch.

The study folder is the truth: events and messages from evaluators only bring the next sweep forward.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from evaluator_daemon.children import Ended, Evaluators
from evaluator_daemon.commands import lift
from evaluator_daemon.errands import Errands, label_key
from evaluator_daemon.gpu_policy import policy_of, training_in_the_way
from evaluator_daemon.home import Home
from evaluator_daemon.job import Job, adopt_run, find_job, read_run, study_folder
from evaluator_daemon.lookout import FULL_SWEEP_S, Lookout, quarantined_in
from evaluator_daemon.news import News
from evaluator_daemon.settings import EvaluatorSettings
from evaluator_daemon.sweep import TrialView, is_over, open_files, wanted_trials
from evaluator_daemon.watcher import Watches
from shared.errors import (
    AlreadyRunningError,
    CheckpointError,
    ContractError,
    DiskError,
    LabError,
    ResourceError,
    SettingsError,
    StudyMismatchError,
    UserError,
)
from shared.files import write_model
from shared.layout import RUN, TRIAL_STATE, StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.logs import log_change, set_up_logs, tear_down_logs
from shared.requests import PendingRequest, RequestFolder
from shared.safetensors_file import read_header
from shared.schemas import Evaluate, EvaluatorManagerState, Retry
from shared.service import Service
from shared.settings import LoadedSettings
from shared.watch_script import write_watch_script

MAX_EVALUATORS = 2
"""One for the trial in training and one for the trial before it; more would only take turns on one device."""
MAX_WATCHED = 32
"""Live trials whose folders are watched; each costs a thread. The others are seen by the sweep."""
HEARTBEAT_S = 60.0
"""How often the state file is written although nothing has changed."""
OPTIMIZER_GRACE_S = 30.0
"""With --exit-when-finished: how long a study that was finished before we came may still be extended."""
LAST_WORDS_S = 2.0
WAKING_NAMES = ("trial_*", RUN)
WAKING_REQUESTS = ("*-*.json",)  # not our own answers
WAKING_IN_TRIALS = ("*.safetensors", TRIAL_STATE)

_log = logging.getLogger(__name__)


def run_manager(
    loaded: LoadedSettings[EvaluatorSettings],
    *,
    once: bool,
    exit_when_finished: bool,
    full_sweep_s: float = FULL_SWEEP_S,
    max_evaluators: int = MAX_EVALUATORS,
) -> None:
    """Watch a study folder until told to stop; see `Manager`.

    Raises:
        AlreadyRunningError: another manager watches this folder.
        Stopped: by a signal.
    """
    study = study_folder(loaded.settings, make=not once)
    with Home(study) as home:
        set_up_logs(study.manager_log)
        service = Service()
        manager = Manager(
            loaded,
            study,
            service,
            home,
            once=once,
            exit_when_finished=exit_when_finished,
            full_sweep_s=full_sweep_s,
            max_evaluators=max_evaluators,
        )
        log_change(_log, "manager started", pid=os.getpid(), folder=study.root)
        try:
            service.run(manager.tick, 1.0 if once else loaded.settings.check_interval)
        finally:
            manager.close()
            log_change(_log, "manager stopped")
            tear_down_logs()
    if manager.failure is not None:
        raise manager.failure


class Manager:
    """One sweep per tick: look where something may have changed, reap, spawn, write the view of it all.

    Args:
        full_sweep_s: how often every trial is looked at, whatever its folder's times say.
        max_evaluators: how many live at once.
    """

    def __init__(
        self,
        loaded: LoadedSettings[EvaluatorSettings],
        study: StudyLayout,
        service: Service,
        home: Home,
        *,
        once: bool,
        exit_when_finished: bool,
        full_sweep_s: float = FULL_SWEEP_S,
        max_evaluators: int = MAX_EVALUATORS,
    ) -> None:
        self.failure: LabError | None = None
        self._loaded = loaded
        self._study = study
        self._service = service
        self._home = home
        self._once = once
        self._exit_when_finished = exit_when_finished
        self._full_sweep_s = full_sweep_s
        self._max_evaluators = max_evaluators
        self._watches = Watches(service.wake)
        self._said_blind: set[str] = set()
        self._said_put_off: dict[str, str] = {}  # what the disk did not allow -> why
        self._requests = RequestFolder(study, "evaluator")
        self._started = datetime.now().astimezone()
        self._started_s = time.monotonic()
        self._saw_optimizer = False
        self._said_waiting = False
        self._said_deferred = False
        self._evaluators = Evaluators(study, service.wake, once=once)
        self._errands = Errands(study, self._requests, once=once)
        self._watches.keep(self._folders())
        self._forget_study()

    def _forget_study(self) -> None:
        """Know nothing of the folder, nor of what those at work in the one before it will still do."""
        self._errands.keep((), self._evaluators)
        self._evaluators.restarts.forget_all()
        self._strangers = set(self._evaluators.names)  # at work in folders that are no more
        self._job: Job | None = None
        self._lookout: Lookout | None = None
        self._news = News(self._study)
        self._complete: set[tuple[str, str, int, int]] = set()  # trial, checkpoint, size, modification time
        self._written: EvaluatorManagerState | None = None
        self._written_s = 0.0

    def tick(self) -> None:
        """Sweep once."""
        if not self._home.is_ours() and not self._come_home():
            return
        try:
            self._tick()
        except (DiskError, FileNotFoundError):
            if self._home.is_ours():
                raise
            self._service.wake()  # the folder went in the middle of it

    def _tick(self) -> None:
        if self._watches.check() and self._lookout is not None:
            self._lookout.demand_full_sweep()
        has_plan = self._find_job()
        self._serve_requests()
        if not has_plan:
            return
        ended = self._evaluators.ended()
        trials = self._look()
        reaped = self._reap(ended)
        with self._or_later("answers"):  # what is not answered now is found recorded next time
            self._errands.settle(reaped)
        self._settle(reaped)
        self._watch(trials)
        self._start_and_stop(trials)
        self._write_state(trials, "running")
        self._say_waits()
        idle = not self._evaluators.names and not self._errands and not self._lookout_goes_on
        if idle and self._is_done(trials):
            self._service.stop()

    def close(self) -> None:
        """End every evaluator and say in the state file that this manager has stopped."""
        self._watches.close()
        self._evaluators.close()
        if self._home.is_ours() and (self._job is not None or self._said_waiting):
            self._write_state(self._look() if self._job else [], "stopped")

    # ----------------------------------------------------------------------------------------------------- the folder

    def _come_home(self) -> bool:
        """The study folder is gone or is another one: leave what was in it, and begin anew where there is one."""
        for name in self._evaluators.names:
            self._evaluators.terminate(name)
        if not self._home.come_back(is_needed=self._once):
            self._reap(self._evaluators.ended())
            return False
        log_change(_log, "study folder replaced", level=logging.WARNING, folder=self._study.root)
        self._forget_study()
        return True

    def _folders(self) -> dict[Path, Sequence[str]]:
        return {self._study.root: WAKING_NAMES, self._requests.path: WAKING_REQUESTS}

    def _watch(self, trials: Sequence[TrialView]) -> None:
        """Watch the live trials too, also those that have an evaluator of their own, which may be long at work."""
        assert self._job is not None
        live = [trial for trial in trials if not is_over(trial, self._job.idle_timeout_s)]
        live.sort(key=lambda trial: (not trial.trainer_lives, trial.state is None))
        folders = self._folders()
        folders |= {self._study.root / trial.name: WAKING_IN_TRIALS for trial in live[:MAX_WATCHED]}
        if self._watches.keep(folders):
            self._service.wake()  # what came between the look and the watch told nobody
        self._say_blind()

    def _say_blind(self) -> None:
        """Say each reason once, for as long as it lasts."""
        blind = {why: folder for folder, why in self._watches.blind.items()}
        for why in blind.keys() - self._said_blind:
            interval_s = self._loaded.settings.check_interval
            log_change(_log, "no events here", level=logging.WARNING, folder=blind[why], why=why, interval_s=interval_s)
        self._said_blind = set(blind)

    @contextlib.contextmanager
    def _or_later(self, what: str) -> Iterator[None]:
        """A disk that takes or gives nothing ends no manager: that is said once, and every tick tries again."""
        try:
            yield
        except (ResourceError, OSError) as error:
            if not self._home.is_ours():
                raise
            if self._said_put_off.get(what) != str(error):
                self._said_put_off[what] = str(error)
                log_change(_log, "put off until the disk allows it", level=logging.WARNING, what=what, why=error)
        else:
            self._said_put_off.pop(what, None)

    # --------------------------------------------------------------------------------------------------------- sweep

    def _serve_requests(self) -> None:
        """Carry out what people ask for; what an evaluator in our way has to make room for first stays pending."""
        pending = None
        with self._or_later("requests"):
            pending = self._requests.pending()
        if pending is None:
            return
        self._errands.keep(pending, self._evaluators)
        for request in pending:
            with self._or_later(f"answer {request.id}"):
                if isinstance(request.command, Retry):
                    self._retry(request, request.command)
                elif self._job is not None:  # without a plan it stays pending
                    assert isinstance(request.command, Evaluate)
                    self._errands.take(request, request.command, self._job)

    def _retry(self, request: PendingRequest, command: Retry) -> None:
        name = command.trial_name
        is_trial = any(trial.name == name for trial in self._study.list_trials())
        evaluator = name if is_trial else label_key(name)
        try:
            result = lift(self._study, command)
        except AlreadyRunningError:
            self._evaluators.terminate(evaluator)
        except DiskError:
            raise
        except (ContractError, UserError, ResourceError, OSError) as error:
            self._requests.refuse(request, str(error))
            log_change(_log, "request refused", level=logging.WARNING, id=request.id, reason=error)
        else:
            self._evaluators.restarts.forget(evaluator)
            self._requests.accept(request, result)
            log_change(_log, "request", kind="retry", id=request.id, trial=name, checkpoints=result["checkpoints"])

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
            self._plan(self._job)
        assert self._job is not None
        job = adopt_run(self._loaded, self._study, self._job, read_run(self._study))
        if job is not self._job:
            if job.plan != self._job.plan:
                for name in self._evaluators.names:
                    self._evaluators.terminate(name)
            self._job = job
            self._plan(job)
        return True

    def _plan(self, job: Job) -> None:
        """Go by a plan from now on."""
        self._lookout = Lookout(self._study, job.plan.digest(), job.idle_timeout_s, full_sweep_s=self._full_sweep_s)
        with self._or_later(self._study.watch_script.name):
            write_watch_script(self._study, only_if_absent=True)
        self._news.objective = job.plan.scoring.objective
        log_change(_log, "plan", samples=job.plan.num_samples, device=job.device, dtype=job.plan.dtype)

    def _look(self) -> list[TrialView]:
        """Return the trials about which there may be something to do."""
        assert self._lookout is not None
        trials = self._lookout.sweep(self._evaluators.names, self._see, self._say_moved)
        if self._lookout.is_under_way:
            self._service.wake()
        return trials

    @property
    def _lookout_goes_on(self) -> bool:
        return self._lookout is not None and self._lookout.is_under_way

    def _see(self, trial: TrialView) -> None:
        self._service.keep_alive()
        self._news.say(trial)
        self._evaluators.note(trial)

    def _say_moved(self, name: str) -> None:
        """An evaluator at work in a folder that is no more would record into nothing."""
        self._news.forget(name)
        self._evaluators.restarts.forget(name)
        if name in self._evaluators.names:
            self._strangers.add(name)
        self._evaluators.terminate(name)
        log_change(_log, "trial folder gone or replaced", level=logging.WARNING, trial=name)

    def _reap(self, names: Sequence[str]) -> list[Ended]:
        """Collect ended evaluators; how one ended says nothing about the folder that stands at its trial's name now."""
        reaped = self._evaluators.reap(names)
        for evaluator in reaped:
            if evaluator.name in self._strangers:
                self._strangers.discard(evaluator.name)
                self._evaluators.restarts.forget(evaluator.name)
        return reaped

    def _start_and_stop(self, trials: list[TrialView]) -> None:
        """Have the most urgent trials evaluated; while somebody asks for other files, these have one of the places."""
        assert self._job is not None
        places = self._max_evaluators - bool(self._errands)
        wanted = [
            trial
            for trial in wanted_trials(trials, self._job.idle_timeout_s, once=self._once)
            if self._evaluators.may_start(trial.name)
        ][:places]
        names = {trial.name for trial in wanted}
        for trial in trials:
            crowded_out = trial.name not in names and len(wanted) == places
            if crowded_out and not open_files(trial):
                self._evaluators.terminate(trial.name)
        if len(self._evaluators.names) < self._max_evaluators and not self._service.stopping:
            self._errands.start(self._evaluators)
        for trial in wanted:
            running = self._evaluators.names
            has_room = trial.name not in running and len(running) < self._max_evaluators
            # asked again: with an open breaker one start leaves no room for the next
            if has_room and not self._service.stopping and self._evaluators.may_start(trial.name):
                self._evaluators.start(trial.name, self._job)

    def _is_done(self, trials: list[TrialView]) -> bool:
        assert self._job is not None
        if self._once:
            return not [t for t in wanted_trials(trials, 0.0, once=True) if self._evaluators.may_start(t.name)]
        if not self._exit_when_finished:
            return False
        over = all(is_over(trial, self._job.idle_timeout_s) and not open_files(trial) for trial in trials)
        run = read_run(self._study)
        if run is None:
            return over and bool(self._lookout and self._lookout.names)
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

    def _settle(self, ended: Sequence[Ended]) -> None:
        """With --once: a crash is a strike, so it is tried again; anything else ends the run with the same code."""
        for evaluator in ended:
            if not self._once or evaluator.code == 0 or evaluator.handled or "/" in evaluator.name:
                continue
            history = self._evaluators.restarts.of(evaluator.name)
            if evaluator.code < 0 and history.failures < 4:
                history.passed, history.not_before_s = False, 0.0
                continue
            log = TrialLayout(self._study.root / evaluator.name).evaluation_log
            message = f"the evaluator of {evaluator.name} ended with exit status {evaluator.code}; {log} says why"
            self.failure = {2: StudyMismatchError, 3: ContractError}.get(evaluator.code, ResourceError)(message)

    # ------------------------------------------------------------------------------------------------- what people see

    def _write_state(self, trials: Sequence[TrialView], status: Literal["waiting", "running", "stopped"]) -> None:
        """Write the state file when anything but the time has changed, and now and then as a sign of life."""
        quarantined = [checkpoint for trial in trials for checkpoint in quarantined_in(trial)]
        if self._lookout is not None:
            quarantined += self._lookout.quarantined
        state = EvaluatorManagerState(
            status=status,
            host=os.uname().nodename,
            pid=os.getpid(),
            started=self._started,
            heartbeat=self._written.heartbeat if self._written else self._started,
            device=self._job.device if self._job else self._loaded.settings.device,
            gpu_policy=policy_of(self._study, self._loaded.settings.gpu_policy),
            waiting_checkpoints=self._count_complete(trials),
            evaluators=self._evaluators.active(trials),
            quarantine=tuple(
                sorted(quarantined, key=lambda checkpoint: (checkpoint.trial_name, checkpoint.checkpoint))
            ),
        )
        now_s = time.monotonic()
        if state != self._written or now_s - self._written_s >= HEARTBEAT_S:
            state = state.model_copy(update={"heartbeat": datetime.now().astimezone()})
            with self._or_later(self._study.manager_state.name):
                write_model(self._study.manager_state, state)
                self._written, self._written_s = state, now_s
        self._service.status(f"{len(state.evaluators)} evaluators, {state.waiting_checkpoints} checkpoints waiting")

    def _say_waits(self) -> None:
        """With --once somebody waits for our end: say once why it does not come."""
        deferred = [e for e in (self._written.evaluators if self._written else ()) if e.activity == "deferred"]
        if not self._once or not deferred or self._said_deferred:
            return
        self._said_deferred = True
        policy = policy_of(self._study, self._loaded.settings.gpu_policy)
        training = training_in_the_way(self._study, policy)
        log = TrialLayout(self._study.root / deferred[0].trial_name).evaluation_log
        why = f"--gpu-policy defer: {training} is training" if training else f"others need the device; {log} says more"
        log_change(_log, "waits for the device", level=logging.WARNING, trial=deferred[0].trial_name, why=why)

    def _count_complete(self, trials: Sequence[TrialView]) -> int:
        """How many unsettled files are whole; what was found whole is not read again before it changes."""
        files = {(trial.name, file.name, file.size, file.modified_ns) for trial in trials for file in open_files(trial)}
        self._complete = {
            file
            for file in files
            if file in self._complete or _is_complete(self._study.root / file[0] / f"{file[1]}.safetensors")
        }
        return len(self._complete)


def _is_complete(path: Path) -> bool:
    try:
        read_header(path, path.parent)
    except CheckpointError:
        return False
    return True
