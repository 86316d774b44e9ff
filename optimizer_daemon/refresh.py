"""Writes the files of results/ anew in a niced child process: one at a time, and once for all that came meanwhile."""

from __future__ import annotations

import logging
import subprocess
import sys

from shared.layout import StudyLayout
from shared.logs import log_change
from shared.process import ProcessIdentity, child_environment, spawn, stop

_PATIENCE_S = 300.0
_log = logging.getLogger(__name__)


class ResultsRefresh:
    """The child that writes statistics, tables, pictures and report.

    Args:
        study: whose results.
    """

    def __init__(self, study: StudyLayout) -> None:
        self._study = study
        self._child: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._top_n: set[int] = set()
        self._started = 0
        self._exit_status = 0

    @property
    def stale(self) -> bool:
        """Whether the trials have changed since the results were written, or they never were."""
        results = self._study.results
        try:
            written = results.all_trials.stat().st_mtime
        except FileNotFoundError:
            return False
        try:
            return results.optimization_history.stat().st_mtime < written
        except FileNotFoundError:
            return True

    def request(self, top_n: int | None = None) -> int:
        """Have the results written from the trials as they stand now; main thread only.

        Args:
            top_n: a table of so many of the best trials, beside the usual one.
        Returns:
            What `outcome` is to be asked with.
        """
        self._wanted = True
        if top_n is not None:
            self._top_n.add(top_n)
        self.poll()
        return self._started + self._wanted

    def outcome(self, asked: int) -> int | None:
        """Return how the child ended that wrote what was asked for: its exit status; None until it has."""
        under_way = self._wanted or self._child is not None
        return self._exit_status if self._started > asked or (self._started == asked and not under_way) else None

    def poll(self) -> None:
        """Collect a child that has ended, and start the next one if there is something new to tell."""
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return
            self._child, self._exit_status = None, code
            if code != 0:
                said = "run `optimizer-daemon analyze` to see why"
                log_change(_log, "results not written", level=logging.WARNING, exit=code, remedy=said)
        if self._wanted:
            self._start(niced=True)

    def finish(self) -> None:
        """Have everything asked for written now, at full priority: nothing else is left to do."""
        self.poll()
        if self._child is None:
            return
        self.stop()
        self._start(niced=False)
        try:
            self._child.wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.stop()
        self.poll()

    def stop(self) -> None:
        """Write nothing more; each file stays as it is."""
        self._wanted = False
        if self._child is not None:
            stop(ProcessIdentity.of(self._child.pid), term_timeout_s=2.0, kill_timeout_s=2.0)
            self._child.wait()
            self._child = None

    def _start(self, *, niced: bool) -> None:
        self._wanted = False
        self._started += 1
        command = [sys.executable, "-m", "optimizer_daemon.analysis.analyze", "--output-dir", str(self._study.root)]
        for top_n in sorted(self._top_n):
            command += ["--top-n", str(top_n)]
        self._top_n.clear()
        environment = {**child_environment(), "OMP_NUM_THREADS": "1"}
        self._child = spawn(
            [*(["nice", "-n", "10"] if niced else []), *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
