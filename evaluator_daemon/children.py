"""The evaluator processes: forked from a server that has imported everything heavy once, reaped, ended."""

from __future__ import annotations

import logging
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

from evaluator_daemon.job import Job
from evaluator_daemon.process import DEFERRED, PRELOADED, run_evaluator_process, run_label_process, wake_on_news
from evaluator_daemon.restarts import BREAKER_S, Restarts
from evaluator_daemon.sweep import TrialView
from shared.failpoints import reach
from shared.layout import StudyLayout
from shared.logs import log_change
from shared.schemas import ActiveEvaluator

STOP_TIMEOUT_S = 20.0

_log = logging.getLogger(__name__)


@dataclass
class RunningEvaluator:
    """One evaluator process.

    Args:
        recorded: recorded checkpoints of its trial when it was first seen; None until then.
        has_recorded: there are more by now.
        handled: asked to end.
        deferred: others need the device now.
    """

    process: ForkServerProcess
    messages: Connection
    started: datetime
    recorded: int | None = None
    has_recorded: bool = False
    handled: bool = False
    deferred: bool = False


@dataclass(frozen=True)
class Ended:
    """How an evaluator ended."""

    name: str
    code: int
    handled: bool


class Evaluators:
    """One process per trial.

    Args:
        wake: called from a thread when one has news, has ended, or may be started again.
        once: each ends when nothing is left to do, and is started once.
    """

    def __init__(self, study: StudyLayout, wake: Callable[[], None], *, once: bool) -> None:
        self._study = study
        self._wake = wake
        self._once = once
        self._running: dict[str, RunningEvaluator] = {}
        self.restarts = Restarts(once=once)
        self._said_broken = False
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))

    @property
    def names(self) -> frozenset[str]:
        """The trials that have one."""
        return frozenset(self._running)

    @property
    def labels(self) -> frozenset[str]:
        """Those that evaluate outside the trials."""
        return frozenset(name for name in self._running if "/" in name)

    def start(self, name: str, job: Job) -> None:
        """Start a trial's evaluator."""
        last_exit = self.restarts.of(name).last_exit
        self._start(name, run_evaluator_process, job, self._study.root / name, not self._once, last_exit)

    def start_label(self, label: str, job: Job, files: Mapping[str, Path | None]) -> None:
        """Start an evaluator of files outside the trials; None among them is the base model alone."""
        name = f"evaluations/{label}"
        self._start(name, run_label_process, job, label, dict(files), self.restarts.of(name).last_exit)

    def _start(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=target, name=f"evaluator {name}", args=(*arguments, theirs))
        process.start()
        theirs.close()
        reach("manager.evaluator_started")
        self._running[name] = RunningEvaluator(process, ours, datetime.now().astimezone())
        watcher = threading.Thread(
            target=wake_on_news, args=(ours, process.sentinel, self._wake), name=f"news of {name}", daemon=True
        )
        watcher.start()
        log_change(_log, "evaluator started", trial=name, pid=process.pid)

    def may_start(self, name: str) -> bool:
        """Whether a trial has an evaluator, or may have one now."""
        if name in self._running:
            return True
        return self.restarts.may_start(name, time.monotonic(), running=len(self._running))

    def note(self, trial: TrialView) -> None:
        """See whether a trial's evaluator gets anything done; a quarantine may be the same fault once more."""
        running = self._running.get(trial.name)
        if running is None:
            return
        recorded = sum(record.status == "recorded" for record in trial.records)
        if running.recorded is None:
            running.recorded = recorded
        elif recorded > running.recorded:
            running.recorded, running.has_recorded = recorded, True
            self.restarts.progressed()
            self._said_broken = False

    def ended(self) -> list[str]:
        """Read what they have to say, and return the trials whose evaluator lives no more."""
        ended = []
        for name, running in self._running.items():
            while running.messages.poll():
                try:
                    running.deferred = running.messages.recv_bytes() == DEFERRED
                except EOFError:
                    break
            if not running.process.is_alive():
                ended.append(name)
        return ended

    def reap(self, names: Iterable[str]) -> list[Ended]:
        """Collect ended ones, after a look at their trials; one that failed is started again only after a while."""
        ended = []
        for name in names:
            running = self._running[name]
            running.process.join()
            code = running.process.exitcode
            assert code is not None
            running.messages.close()
            running.process.close()
            del self._running[name]
            wait_s = self.restarts.ended(
                name,
                code,
                time.monotonic(),
                asked_to=running.handled,
                settled=running.has_recorded,
                chance=random.random(),
            )
            level = logging.INFO if code == 0 or running.handled else logging.WARNING
            log_change(_log, "evaluator ended", level=level, trial=name, exit=code, retry_in_s=wait_s)
            self._say_broken()
            self._wake_in(wait_s)
            ended.append(Ended(name, code, running.handled))
        return ended

    def terminate(self, name: str) -> None:
        """Ask a trial's evaluator to end, where there is one."""
        running = self._running.get(name)
        if running is not None and not running.handled:
            running.handled = True
            running.process.terminate()

    def close(self) -> None:
        """End them all; one that does not within a while is killed."""
        for name in self._running:
            self.terminate(name)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for running in self._running.values():
            running.process.join(max(0.0, deadline - time.monotonic()))
            if running.process.is_alive():
                running.process.kill()
                running.process.join()
        self._running.clear()

    def active(self, trials: Sequence[TrialView]) -> tuple[ActiveEvaluator, ...]:
        """Return what each is doing, as the manager shows it."""
        by_name = {trial.name: trial for trial in trials}
        return tuple(_active(name, running, by_name.get(name)) for name, running in self._running.items())

    def _say_broken(self) -> None:
        if self.restarts.is_broken and not self._said_broken:
            self._said_broken = True
            why = "evaluators fail one after the other without a result; one at a time is tried"
            log_change(_log, why, level=logging.WARNING, every_s=BREAKER_S)

    def _wake_in(self, wait_s: float) -> None:
        """The next tick by the clock may be long after the back-off."""
        if wait_s == 0:
            self._wake()
            return
        timer = threading.Timer(wait_s, self._wake)
        timer.daemon = True
        timer.start()


def _active(name: str, running: RunningEvaluator, trial: TrialView | None) -> ActiveEvaluator:
    in_hand = next((r.checkpoint for r in (trial.records if trial else ()) if r.status == "evaluating"), None)
    assert running.process.pid is not None
    activity: Literal["evaluating", "waiting", "deferred"]
    at_work = in_hand is not None or "/" in name  # one outside the trials ends with its work
    activity = "deferred" if running.deferred and not in_hand else "evaluating" if at_work else "waiting"
    return ActiveEvaluator(
        trial_name=name.rpartition("/")[2],
        pid=running.process.pid,
        started=running.started,
        activity=activity,
        checkpoint=in_hand,
    )
