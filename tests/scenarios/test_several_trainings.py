"""Several trainings at once: --jobs on a CPU, --gpus on cards that only the driver's listing is made up for."""

from __future__ import annotations

import json
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest

from shared.errors import DeviceBusyError
from shared.files import read_model
from shared.gpu_lease import GpuLease
from shared.schemas import Run, TrainerExit, TrialState
from tests.scenarios.invariants import violations
from tests.scenarios.lab import wait_until
from tests.scenarios.quick_lab import PATIENCE_S, QuickLab

CARDS = ("GPU-1a2b", "GPU-3c4d")
TICKS_S = 3.0  # several of the daemon's


@pytest.fixture
def lab(tmp_path: Path):
    with QuickLab(tmp_path) as lab:
        yield lab


def state(lab: QuickLab, number: int) -> TrialState:
    return read_model(lab.study.trial(number).state, TrialState)


def spans(lab: QuickLab) -> list[tuple[datetime, datetime]]:
    """When each trial's training ran."""
    records = [read_model(trial.trainer_exit, TrainerExit) for trial in lab.study.list_trials()]
    return [(record.started, record.ended) for record in records]


def most_at_once(spans: list[tuple[datetime, datetime]]) -> int:
    return max(sum(began <= moment < ended for began, ended in spans) for moment, _ in spans)


def training(lab: QuickLab) -> list[str]:
    """Names of the trials whose trainer lives."""
    return sorted(lab.trainers())


@pytest.mark.timeout(1800)
def test_two_train_at_once_and_never_three_and_both_outlive_a_killed_daemon(lab):
    hold = str(lab.folder / "go on with {}")
    daemon = lab.optimizer("--n-trials", 5, "--jobs", 2, hold=hold)
    for number in (1, 2):
        lab.wait_for_training(number, daemon)
    time.sleep(TICKS_S)
    assert len(lab.study.list_trials()) == 2, "no third was drawn"
    assert read_model(lab.study.run, Run).slots == 2
    shown = json.loads(lab.ask("status", "--json").stdout)
    assert [(row["trial"], row["state"]) for row in shown["under_way"]] == [(1, "training"), (2, "training")]
    trainers = lab.trainers()

    daemon.kill()
    daemon = lab.optimizer("--n-trials", 5, "--jobs", 2, hold=hold)
    wait_until(lambda: lab.log().count("trainer_alive=True") == 2, PATIENCE_S, daemon.said)
    time.sleep(TICKS_S)
    assert lab.trainers() == trainers, "the same processes, and no third"
    assert len(lab.study.list_trials()) == 2

    Path(hold.format("lora_trial_1")).touch()
    lab.wait_for_training(3, daemon)
    assert training(lab) == ["trial_0002", "trial_0003"]
    for number in range(2, 7):
        Path(hold.format(f"lora_trial_{number}")).touch()
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert violations(lab.study, finished=5) == []
    assert len(lab.study.list_trials()) == 5, "not one more than was asked for"
    assert most_at_once(spans(lab)) == 2
    assert [state(lab, number).attempt for number in range(1, 6)] == [1] * 5


@pytest.mark.timeout(1800)
def test_both_stop_in_order_and_go_on_one_after_the_other_where_there_is_one_slot(lab):
    daemon = lab.optimizer("--n-trials", 2, "--jobs", 2, hold="/nonexistent/go on")
    for number in (1, 2):
        lab.wait_for_training(number, daemon)
    assert daemon.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "trainings=2" in lab.log()
    assert lab.trainers() == {}
    assert [state(lab, number).state for number in (1, 2)] == ["interrupted"] * 2
    stopped = [read_model(lab.study.trial(number).trainer_exit, TrainerExit).ended for number in (1, 2)]
    daemon = lab.optimizer("--n-trials", 2)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert violations(lab.study, finished=2) == []
    assert [(state(lab, number).attempt, state(lab, number).resumes) for number in (1, 2)] == [(1, 1)] * 2
    again = spans(lab)
    assert all(began > max(stopped) for began, _ in again)
    assert most_at_once(again) == 1, "the second one waited for the only slot"


@pytest.mark.timeout(1800)
def test_each_training_has_a_gpu_of_its_own_and_the_next_one_gets_the_one_that_is_free(lab, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(lab.folder))
    hold = str(lab.folder / "go on with {}")
    flags = ("--n-trials", 3, "--gpus", "0,1", "--device", "auto")
    daemon = lab.optimizer(*flags, hold=hold, env={"GPUS": ",".join(CARDS)})
    for number, card in enumerate(CARDS, 1):
        lab.wait_for_training(number, daemon)
        assert state(lab, number).gpu == card
        assert lab.study.trial(number).training_log.read_text().startswith(f"training from epoch 1 on {card}\n")
        with pytest.raises(DeviceBusyError):
            GpuLease(card, "exclusive trainer").acquire()
    assert f"trial 1: training on {CARDS[0]}, checkpoints" in lab.ask("status").stdout

    daemon.kill()
    daemon = lab.optimizer(*flags, hold=hold, env={"GPUS": ",".join(CARDS)})
    wait_until(lambda: lab.log().count("trainer_alive=True") == 2, PATIENCE_S, daemon.said)
    Path(hold.format("lora_trial_2")).touch()
    lab.wait_for_training(3, daemon)
    assert state(lab, 3).gpu == CARDS[1]
    assert training(lab) == ["trial_0001", "trial_0003"]
    for number in (1, 3):
        Path(hold.format(f"lora_trial_{number}")).touch()
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert violations(lab.study, finished=3) == []
    for card in CARDS:
        GpuLease(card, "exclusive trainer").acquire().release()


@pytest.mark.timeout(1800)
def test_a_pause_lasts_for_every_slot_and_one_that_hangs_is_ended_and_replaced(lab):
    """Each training has a clock of its own."""
    hold = str(lab.folder / "go on with {}")
    daemon = lab.optimizer("--n-trials", 2, "--jobs", 2, hold=hold, env={"SCRIPTED_PATIENCE_S": "20"})
    for number in (1, 2):
        lab.wait_for_training(number, daemon)
    assert lab.ask("pause").returncode == 0
    Path(hold.format("lora_trial_2")).touch()
    for number, end in ((2, "complete"), (1, "failed")):
        wait_until(lambda number=number, end=end: state(lab, number).state == end, PATIENCE_S, daemon.said)
    assert (state(lab, 1).reason or "").startswith("hung: no progress line for 20 s")
    assert lab.trainers() == {}
    assert len(lab.study.list_trials()) == 2, "nothing starts during a pause"
    Path(hold.format("lora_trial_3")).touch()
    assert lab.ask("resume").returncode == 0
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert [state(lab, number).state for number in (1, 2, 3)] == ["failed", "complete", "complete"]
    assert len(lab.study.list_trials()) == 3, "one more for the one that failed"


@pytest.mark.timeout(1800)
def test_three_failures_in_a_row_end_the_study_and_stop_the_training_beside_them_in_order(lab):
    hold = str(lab.folder / "go on with {}")
    for number in (2, 3, 4):
        Path(hold.format(f"lora_trial_{number}")).touch()
    behaviour = json.dumps({"hold": hold, "exit_at_epoch": 2})
    daemon = lab.optimizer("--n-trials", 5, "--jobs", 2, env={"SCRIPTED_TRAINER": behaviour})
    assert daemon.wait(PATIENCE_S) == 4, daemon.said
    assert "3 trials in a row failed in the same way" in daemon.said
    assert [state(lab, number).state for number in range(1, 5)] == ["interrupted", *["failed"] * 3]
    assert lab.trainers() == {}
    Path(hold.format("lora_trial_1")).touch()
    daemon = lab.optimizer("--n-trials", 1)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert (state(lab, 1).state, state(lab, 1).attempt) == ("complete", 1)
