"""Scores a trial where no evaluator manager lives, by the very command that a manager would start for it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from shared.errors import ResourceError
from shared.layout import StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.process import ProcessIdentity, child_environment, spawn, stop

EVALUATOR = (sys.executable, "-m", "evaluator_daemon.cli")

MOST_FAILURES = 3  # in a row
FIRST_PAUSE_S = 5.0  # after a failure, doubled by each further one

_TERM_TIMEOUT_S, _KILL_TIMEOUT_S = 15.0, 5.0
_QUOTED_BYTES = 2000

_log = logging.getLogger(__name__)


@dataclass
class _Running:
    trial: TrialLayout
    process: subprocess.Popen[bytes]
    output: IO[bytes]


class ScoringCommand:
    """At most one scoring at a time.

    Args:
        command: the evaluator's program, before its verb.
        threads: CPU threads it may use.
        clock: monotonic time in seconds.
    """

    def __init__(self, command: Sequence[str], threads: int, clock: Callable[[], float]) -> None:
        self._command = tuple(command)
        self._threads = threads
        self._clock = clock
        self._running: _Running | None = None
        self._failures = 0
        self._not_before = 0.0

    @property
    def scored_now(self) -> TrialLayout | None:
        """The trial in hand."""
        return self._running.trial if self._running is not None else None

    @property
    def ready(self) -> bool:
        """Whether `start` may be called: nothing runs, and the pause after a failure is over."""
        return self._running is None and self._clock() >= self._not_before

    def others_score(self, trial: TrialLayout, study: StudyLayout) -> bool:
        """Whether a trial's scores come without a new command, or none may start yet."""
        return not self.ready or FileLock.is_held(study.manager_lock) or FileLock.is_held(trial.evaluations.lock)

    def start(self, trial: TrialLayout, device: str) -> None:
        """Begin to score a trial's checkpoints on a device. Main thread only."""
        output = tempfile.TemporaryFile()  # noqa: SIM115  closed by `poll` or `stop`
        argv = [*self._command, "evaluate", "--trial", str(trial.folder), "--device", device]
        self._running = _Running(trial, spawn_evaluator(argv, self._threads, output), output)
        log_change(_log, "scoring started", trial=trial.number, by="evaluator-daemon evaluate")

    def poll(self) -> None:
        """Collect a command that has ended.

        Raises:
            ResourceError: it failed three times in a row.
        """
        if self._running is None or (code := self._running.process.poll()) is None:
            return
        running, self._running = self._running, None
        with running.output:
            said = tail(running.output)
        if code == 0:
            self._failures = 0
            return
        self._failures += 1
        self._not_before = self._clock() + pause_s(self._failures)
        log_change(
            _log, "scoring failed", level=logging.WARNING, trial=running.trial.number, exit=code, said=said[-300:]
        )
        if self._failures >= MOST_FAILURES:
            raise ResourceError(
                f"scoring {running.trial.name} failed {self._failures} times in a row (exit status {code}); see "
                f"{running.trial.evaluation_log}; it said: {said}"
            )

    def stop(self) -> None:
        """End the scoring in hand; what it has recorded counts, and the rest is scored at the next start."""
        if self._running is None:
            return
        running = self._running
        stop_evaluator(running.process)
        running.output.close()
        self._running = None  # last: a second signal may interrupt us, and then we are called again


def spawn_evaluator(argv: Sequence[str], threads: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the evaluator's program; what it says goes to a file. Main thread only."""
    environment = {**child_environment(), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return spawn(argv, env=environment, stdout=output, stderr=output)


def stop_evaluator(process: subprocess.Popen[bytes]) -> None:
    """End the evaluator's program with all it started; what it has recorded counts."""
    stop(ProcessIdentity.of(process.pid), term_timeout_s=_TERM_TIMEOUT_S, kill_timeout_s=_KILL_TIMEOUT_S)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_KILL_TIMEOUT_S)


def pause_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row."""
    return float(FIRST_PAUSE_S * 2 ** (failures - 1))


def tail(output: IO[bytes]) -> str:
    """Return the end of what a program said, in one line."""
    end = output.seek(0, os.SEEK_END)
    output.seek(max(0, end - _QUOTED_BYTES))
    return " | ".join(output.read().decode(errors="replace").split("\n")).strip(" |") or "nothing"
