"""Redraws the pictures of results/ in a niced child process: one at a time, and once for all that came meanwhile."""

from __future__ import annotations

import logging
import subprocess
import sys

from shared.layout import StudyLayout
from shared.logs import log_change
from shared.process import ProcessIdentity, child_environment, spawn, stop

_PATIENCE_S = 300.0
_log = logging.getLogger(__name__)


class PictureRefresh:
    """The child that draws.

    Args:
        study: whose results.
    """

    def __init__(self, study: StudyLayout) -> None:
        self._study = study
        self._child: subprocess.Popen[bytes] | None = None
        self._wanted = False

    @property
    def stale(self) -> bool:
        """Whether the results have changed since the pictures were drawn, or never were."""
        results = self._study.results
        try:
            written = results.all_trials.stat().st_mtime
        except FileNotFoundError:
            return False
        try:
            return results.optimization_history.stat().st_mtime < written
        except FileNotFoundError:
            return True

    def request(self) -> None:
        """Have the pictures drawn from the results as they stand now; main thread only."""
        self._wanted = True
        self.poll()

    def poll(self) -> None:
        """Collect a child that has ended, and start the next one if there is something new to draw."""
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return
            self._child = None
            if code != 0:
                said = "run python -m optimizer_daemon.analysis.plots to see why"
                log_change(_log, "pictures not drawn", level=logging.WARNING, exit=code, remedy=said)
        if self._wanted:
            self._start(niced=True)

    def finish(self) -> None:
        """Have everything asked for drawn now, at full priority: nothing else is left to do."""
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
        """Draw nothing more; the pictures stay as they are."""
        self._wanted = False
        if self._child is not None:
            stop(ProcessIdentity.of(self._child.pid), term_timeout_s=2.0, kill_timeout_s=2.0)
            self._child.wait()
            self._child = None

    def _start(self, *, niced: bool) -> None:
        self._wanted = False
        command = [sys.executable, "-m", "optimizer_daemon.analysis.plots", "--output-dir", str(self._study.root)]
        environment = {**child_environment(), "OMP_NUM_THREADS": "1"}
        self._child = spawn(
            [*(["nice", "-n", "10"] if niced else []), *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
