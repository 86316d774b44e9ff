"""kill -9 in the middle of trainings by the real sd-scripts: each goes on where it was saved, and repeats nothing."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from optimizer_daemon.trainers import TRAINERS
from shared.files import read_model
from shared.layout import TrialLayout
from shared.schemas import TrainerExit, TrialState
from tests.kohya.kohya_lab import KohyaLab
from tests.kohya.narrow_world import NarrowWorld
from tests.scenarios.lab import Daemon, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EPOCHS = 16
PATIENCE_S = 600.0
KOHYA = TRAINERS.load("kohya")


def test_killed_twice_a_training_repeats_no_epoch_that_was_saved(world: NarrowWorld, tmp_path: Path):
    """First with its daemon, then alone; sd-scripts' own count of a second resume would begin again too early."""
    with KohyaLab(tmp_path, world, epochs=EPOCHS) as lab:
        manager = lab.manager("--exit-when-finished")
        trial = lab.study.trial(1)
        daemon = lab.optimizer("--n-trials", 1)
        wait_for_epoch(trial, 2, daemon)
        daemon.kill()
        kill_training(lab)
        first = saved(trial)

        daemon = lab.optimizer("--n-trials", 1)
        wait_for_epoch(trial, first + 4, daemon)
        kill_training(lab)  # the daemon starts it again by itself
        second = saved(trial)
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
        assert manager.wait(PATIENCE_S) == 0, manager.said

        assert first < second < EPOCHS
        begun = starts(trial)
        assert [epochs[0] for epochs in begun] == [1, first + 1, second + 1]
        assert [epochs == list(range(epochs[0], epochs[-1] + 1)) for epochs in begun] == [True] * 3
        assert begun[-1][-1] == EPOCHS
        command = read_model(trial.trainer_exit, TrainerExit).command
        state = str(trial.folder / f"{trial.output_name}-{second:06d}-state")
        assert list(command[-4:]) == ["--resume", state, "--initial_epoch", str(second + 1)]
        ended = read_model(trial.state, TrialState)
        assert (ended.state, ended.attempt, ended.resumes) == ("complete", 1, 2)
        assert [point.epoch for point in ended.curve] == list(range(2, EPOCHS + 1, 2))


def wait_for_epoch(trial: TrialLayout, epoch: int, daemon: Daemon) -> None:
    """Wait for a whole state of this epoch or a later one."""

    def is_saved() -> bool:
        assert daemon.exit_status is None, daemon.said
        point = KOHYA.resume_point(trial) if trial.folder.is_dir() else None
        return point is not None and point.epoch is not None and point.epoch >= epoch

    wait_until(is_saved, PATIENCE_S, daemon.said)


def kill_training(lab: KohyaLab) -> None:
    """kill -9 the trainer and its supervisor."""
    for pid in lab.trainers()[lab.study.trial(1).name]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def saved(trial: TrialLayout) -> int:
    """Return the epoch of the newest whole state."""
    point = KOHYA.resume_point(trial)
    assert point is not None
    assert point.epoch is not None
    return point.epoch


def starts(trial: TrialLayout) -> list[list[int]]:
    """Return the epochs that each start of the training announced."""
    _, *runs = trial.training_log.read_text().split("\nrunning training")
    return [[int(number) for number in re.findall(r"^epoch (\d+)/", run, re.MULTILINE)] for run in runs]
