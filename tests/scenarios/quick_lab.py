"""A lab whose trainings and scores take milliseconds, for tests about the optimizer daemon itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from shared.locks import FileLock
from tests.scenarios.lab import ROOT, Daemon, Lab, wait_until

SCRIPTS = ROOT / "tests" / "optimizer_daemon"
PATIENCE_S = 600.0  # a busy machine may take long, a working one never does
NEVER = "/nonexistent/go on"
"""As `hold`: a training that never gets beyond its first epoch."""


class QuickLab(Lab):
    """A Lab with the scripted trainer and the scripted evaluator in place of the real ones."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, optimizer='trainer = "scripted_trainer:TRAINER"')
        text = self.study_file.read_text().replace("num_samples = 2", "num_samples = 1")
        self.study_file.write_text(text)

    def optimizer(
        self, *flags: object, failpoints: str = "", env: Mapping[str, str] | None = None, hold: str = ""
    ) -> Daemon:
        """Start the daemon; its trainings wait after their first epoch until the file `hold` exists.

        A file for each where it holds {}, which stands for the training's output name.
        """
        command = [sys.executable, str(SCRIPTS / "launch.py"), "--config", str(self.study_file), *map(str, flags)]
        scripted = {"SCRIPTED_TRAINER": json.dumps({"hold": hold}), **(env or {})}
        return Daemon("optimizer", command, self.environment(failpoints, scripted), self.folder / "optimizer.out")

    def environment(self, failpoints: str = "", env: Mapping[str, str] | None = None) -> dict[str, str]:
        found = super().environment(failpoints, env)
        return {**found, "PYTHONPATH": f"{found['PYTHONPATH']}{os.pathsep}{SCRIPTS}"}

    def ask(self, *words: object, failpoints: str = "") -> subprocess.CompletedProcess[str]:
        """Run a verb of `optimizer-daemon` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "optimizer_daemon.cli", words[0], "--config", self.study_file, *map(str, words[1:])],
            capture_output=True, text=True, check=False, env=self.environment(failpoints), timeout=PATIENCE_S,
        )  # fmt: skip

    def log(self) -> str:
        """What the daemon's log holds."""
        return self.study.optimizer_log.read_text() if self.study.optimizer_log.exists() else ""

    def wait_for_training(self, number: int, daemon: Daemon) -> None:
        """Wait until a trial's training has its first epoch behind it."""
        log = self.study.trial(number).training_log
        wait_until(
            lambda: daemon.exit_status is not None or (log.exists() and "scripted: 1" in log.read_text()),
            PATIENCE_S,
            f"trial {number} does not train: {daemon.said}",
        )
        assert daemon.exit_status is None, daemon.said

    def kill_training(self, number: int) -> None:
        """kill -9 a trial's training and its supervisor."""
        lock = self.study.trial(number).trainer_lock
        while FileLock.is_held(lock):
            for pid in self.trainers().get(self.study.trial(number).name, set()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
