"""One trial of a study on the tiny world, trained through the daemon's own runner by any trainer."""

from __future__ import annotations

import argparse
import os
import secrets
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples.tiny_world.paths import BASE_MODEL
from optimizer_daemon.runner import LiveTrial, Runner
from optimizer_daemon.settings import load_optimizer_settings
from optimizer_daemon.study_file import find_run
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import Prepares
from optimizer_daemon.training_log import TrainingLog
from shared.layout import StudyLayout, TrialLayout
from shared.process import StopReport
from shared.schemas import TrainerExit, TrialParams, TrialState
from tests.scenarios.lab import DATASET_TOML, MARK, processes_of

STEPS_PER_EPOCH = 6
PATIENCE_S = 900.0  # a busy machine may take long, a working one never does
_MARK = secrets.token_hex(8)
"""Every process of a trial, however deep, inherits it in its environment: that is how strays are found."""

PARAMETERS = {
    "learning_rate": 1e-3,
    "network_dim": 4,
    "network_alpha": 2.0,
    "optimizer_type": "AdamW",
    "max_train_epochs": 2,
}


class Bench:
    """A study of one trial below `root`; use it as a context manager, so that nothing of it outlives the test.

    Args:
        root: an empty folder.
        trainer: as `--trainer` takes it.
        table: further lines of the study file, such as the trainer's own table.
        base: the base model.
        beside: a bench of the same trainer, whose preloaded process is used; it takes half a minute to make one.
        parameters: what the trial trains with.
    """

    def __init__(
        self,
        root: Path,
        trainer: str = "native",
        table: str = "",
        base: Path = BASE_MODEL,
        beside: Bench | None = None,
        **parameters: Any,
    ) -> None:
        (root / "dataset.toml").write_text(DATASET_TOML)
        (root / "study.toml").write_text(
            f'[optimizer]\ntrainer = "{trainer}"\nbase_model = "{base}"\ndataset_config = "dataset.toml"\n'
            f'output_dir = "study"\ndevice = "cpu"\nsave_every_n_epochs = 1\n{table}\n'
        )
        self.settings = load_optimizer_settings(argparse.Namespace(config=root / "study.toml"))
        self.study = StudyLayout(root / "study")
        self.run = find_run(self.settings, self.study, datetime.now().astimezone())
        self.plugin = TRAINERS.load(trainer)
        if isinstance(self.plugin, Prepares):
            self.plugin.prepare(self.run, self.study)
        self.params = TrialParams(
            trial=1, optuna_number=0, parameters={**PARAMETERS, **parameters}, origin="sampler", training_seed=7
        )
        self.trial: TrialLayout = self.study.trial(1)
        self.trial.folder.mkdir(parents=True)
        self.runner = Runner(self.plugin, self.run)
        self.gpu: str | None = None
        self._borrowed = beside is not None
        if beside is not None:
            self.runner._preloaded = beside.runner._preloaded
        self.live = LiveTrial(
            self.trial,
            self.params,
            TrialState(trial=1, optuna_number=0, state="drawn", attempt=1, drawn=datetime.now().astimezone()),
            TrainingLog(self.trial.training_log),
        )
        self._environment = pytest.MonkeyPatch()

    def __enter__(self) -> Bench:
        self._environment.setenv(MARK, _MARK)
        return self

    def __exit__(self, *_: object) -> None:
        self._environment.undo()
        self.stop()
        if not self._borrowed:
            self.runner.close()
        assert self.strays() == {}

    def start(self) -> None:
        """Start the training as soon as the runner would, from its saved state where there is one."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.runner.may_start(self.live, [self.gpu]):
            assert time.monotonic() < deadline, "it may never start"
            time.sleep(0.05)
        self.runner.start(self.live, time.monotonic())

    def follow(self) -> int:
        """Read what the training has said; return its optimizer steps so far, 0 while it prepares."""
        for _ in self.runner.follow(self.live, time.monotonic()):
            pass
        progress = self.live.progress
        return 0 if progress is None or progress.preparing is not None else progress.step

    def wait_for_step(self, step: int) -> None:
        """Wait until the training says that it has done so many steps."""
        deadline = time.monotonic() + PATIENCE_S
        while self.follow() < step:
            assert self.is_alive, f"it ended before step {step}:\n{self.log}"
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    def stop(self) -> StopReport | None:
        """End the training as the daemon does at SIGTERM."""
        return self.runner.stop(self.live, term_timeout_s=60, kill_timeout_s=10)

    def finish(self) -> TrainerExit:
        """Wait for the end of the training."""
        assert self.live.process is not None and self.live.process.wait(PATIENCE_S), self.log
        return self.record

    @property
    def is_alive(self) -> bool:
        return self.live.process is not None and self.live.process.is_alive

    @property
    def record(self) -> TrainerExit:
        assert self.live.process is not None
        record = self.live.process.exit_record()
        assert record is not None, self.log
        return record

    @property
    def log(self) -> str:
        return self.trial.training_log.read_text(errors="replace") if self.trial.training_log.exists() else ""

    @property
    def checkpoints(self) -> list[str]:
        return [path.name for path in self.trial.list_checkpoints()]

    def strays(self) -> dict[int, str]:
        """Every living process of this trial: pid -> command line; but for the one that trainings are forked from."""
        found = processes_of(_MARK)
        found.pop(os.getpid(), None)
        ours = {child.pid for child in psutil.Process().children()}
        return {pid: line for pid, line in found.items() if pid not in ours or "shared.preload" not in line}
