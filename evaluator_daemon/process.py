"""What runs in an evaluator process and around it: the fork's first steps, its end with the manager, its news."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from evaluator_daemon.job import Job
from shared.commands import run_command
from shared.errors import ContractError, LabError, ResourceError, UserError
from shared.layout import StudyLayout, TrialLayout
from shared.logs import log_change, set_up_logs

PRELOADED = (
    "evaluator_daemon.outside",
    "evaluator_daemon.renderers.diffusion",
    "evaluator_daemon.metrics.clip_consistency",
)
"""What the fork server imports once, so that an evaluator starts in a moment and shares the memory."""

NEWS, DEFERRED = b"news", b"deferred"
"""What an evaluator tells the manager: its records have changed; others need the device now."""

_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_SERVICE_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

_log = logging.getLogger(__name__)


def run_evaluator_process(job: Job, trial: Path, watch: bool, previous_exit: int | None, messages: Connection) -> None:
    """What a trial's evaluator process does after the fork; exits with the codes of `shared.errors`."""

    def work() -> None:
        # by name: the manager must not import what only its children need
        evaluator: Any = importlib.import_module("evaluator_daemon.evaluator")
        evaluator.evaluate_trial(
            job,
            trial,
            watch=watch,
            previous_crash=crash_text(previous_exit),
            changed_state=lambda: messages.send_bytes(NEWS),
            deferred=lambda: messages.send_bytes(DEFERRED),
        )

    _run_child(work, TrialLayout(trial).evaluation_log)


def run_label_process(
    job: Job, label: str, files: Mapping[str, Path | None], previous_exit: int | None, messages: Connection
) -> None:
    """What an evaluator of files outside the trials does after the fork; exits with the codes of `shared.errors`."""
    layout = StudyLayout(job.root).evaluations(label)
    layout.folder.mkdir(parents=True, exist_ok=True)

    def work() -> None:
        outside: Any = importlib.import_module("evaluator_daemon.outside")
        outside.evaluate_outside(
            job,
            label,
            files,
            previous_crash=crash_text(previous_exit),
            changed_state=lambda: messages.send_bytes(NEWS),
            deferred=lambda: messages.send_bytes(DEFERRED),
        )

    _run_child(work, layout.log)


def _run_child(work: Callable[[], None], log: Path) -> NoReturn:
    for name in _SERVICE_VARIABLES:
        os.environ.pop(name, None)
    os.setsid()  # a terminal's Ctrl-C reaches the manager alone, which passes it on
    threading.Thread(target=_die_with_manager, daemon=True).start()
    set_up_logs(log, to_stderr=False)

    def command() -> int:
        try:
            work()
        except LabError as error:
            log_change(_log, "ended", level=logging.WARNING, reason=error)
            raise
        return 0

    sys.exit(run_command(command))


def _die_with_manager() -> None:
    """An evaluator whose manager is gone must leave its trial to whoever evaluates it next."""
    manager = multiprocessing.parent_process()
    assert manager is not None
    manager.join()
    os.kill(os.getpid(), signal.SIGKILL)


def wake_on_news(messages: Connection, sentinel: int, wake: Callable[[], None]) -> None:
    """Bring the manager's next sweep forward when an evaluator has news or has ended."""
    try:
        while True:
            wait([messages, sentinel])
            wake()
            if wait([sentinel], timeout=0.2):  # also leaves the sweep time to read the message
                return
    except (OSError, ValueError):
        return  # closed by the sweep that reaped the evaluator


def crash_text(exit_code: int | None) -> str | None:
    """Say how a process ended by its own fault; None when it was stopped, ended well or nobody knows.

    An error of our own tree tells of the study, the machine or the disk; one about a checkpoint ends no process.
    """
    ours = (UserError.exit_code, ContractError.exit_code, ResourceError.exit_code)
    if exit_code is None or exit_code in (0, *ours, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        return None
    if exit_code > 0:
        return f"the evaluator ended with exit status {exit_code}"
    return f"the evaluator crashed by {signal.Signals(-exit_code).name}" if -exit_code in _CRASHES else None
