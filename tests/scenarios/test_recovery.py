"""kill -9 of the optimizer daemon at every named place, closed terminals, trainings without a daemon: what follows."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from shared.failpoints import PLACES
from shared.files import read_model, write_model
from shared.locks import FileLock
from shared.process import ProcessIdentity
from shared.schemas import AllTrials, Run, TrialState
from tests.scenarios.invariants import violations
from tests.scenarios.lab import wait_until
from tests.scenarios.quick_lab import NEVER, PATIENCE_S, SCRIPTS, QuickLab

REDO = "optimizer.remains_moved"
ELSEWHERE = (
    "optimizer.pruned",
    "optimizer.finalist_in_line",
    "optimizer.baseline_copied",
)  # tested in files of their own
IN_TURN = [place for place in PLACES if place.startswith("optimizer.") and place not in (REDO, *ELSEWHERE)]


@pytest.fixture
def lab(tmp_path):
    with QuickLab(tmp_path) as lab:
        yield lab


def state(lab: QuickLab, number: int) -> TrialState:
    return read_model(lab.study.trial(number).state, TrialState)


def killed_at(lab: QuickLab, place: str, trials: int, **options: str) -> None:
    daemon = lab.optimizer("--n-trials", trials, failpoints=f"{place}=kill", **options)
    assert daemon.wait(PATIENCE_S) == -signal.SIGKILL, f"{place}: {daemon.said}"


@pytest.mark.timeout(1800)
def test_killed_at_every_place_in_turn_the_study_ends_as_if_nothing_had_been(lab):
    for place in IN_TURN:
        killed_at(lab, place, 2)
    daemon = lab.optimizer("--n-trials", 2)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert violations(lab.study, finished=2) == []
    first = state(lab, 1)
    assert (first.attempt, first.resumes) == (1, 0), "none of it was the training's fault"
    assert len(read_model(lab.study.results.all_trials, AllTrials).trials) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_while_the_remains_are_set_aside_the_redo_keeps_number_and_draw(lab):
    daemon = lab.optimizer("--n-trials", 1, failpoints=f"{REDO}=kill", hold=NEVER)
    lab.wait_for_training(1, daemon)
    drawn = lab.study.trial(1).params.read_bytes()
    lab.kill_training(1)
    assert daemon.wait(PATIENCE_S) == -signal.SIGKILL, daemon.said
    daemon = lab.optimizer("--n-trials", 1)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert violations(lab.study, finished=1) == []
    assert lab.study.trial(1).params.read_bytes() == drawn
    kept = [path.name for path in lab.study.trial(1).folder.glob("attempts/*/*")]
    assert "training.log" in kept
    assert len(kept) == len(set(kept)), "nothing was moved twice"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_training_without_daemon_and_supervisor_is_adopted_and_stopped_in_order(lab):
    first = lab.optimizer("--n-trials", 1, hold=NEVER)
    lab.wait_for_training(1, first)
    lock = lab.study.trial(1).trainer_lock
    supervisor = FileLock.signed_pid(lock)
    assert supervisor is not None
    trainer = lab.trainers()["trial_0001"] - {supervisor}
    first.kill()
    os.kill(supervisor, signal.SIGKILL)
    # As a daemon leaves it that is killed in the middle of an orderly stop.
    stopping = state(lab, 1).model_copy(update={"state": "interrupted", "reason": "stopped by signal 15"})
    write_model(lab.study.trial(1).state, stopping)
    second = lab.optimizer("--n-trials", 1, hold=NEVER)
    wait_until(lambda: "trial found" in lab.log(), PATIENCE_S, second.said)
    assert "trial found trial=1 state=training trainer_alive=True" in lab.log()
    assert lab.trainers()["trial_0001"] == trainer, "the same process, and nobody beside it"
    assert second.stop() == 128 + signal.SIGTERM
    assert lab.trainers() == {}
    assert (state(lab, 1).state, state(lab, 1).attempt) == ("interrupted", 1)
    assert lab.optimizer("--n-trials", 1).wait(PATIENCE_S) == 0
    assert violations(lab.study, finished=1) == []


@pytest.mark.timeout(1800)
def test_a_closed_terminal_stops_the_daemon_in_order(lab):
    terminal, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPTS / "launch.py"), "--config", str(lab.study_file), "--n-trials", "1"]
    environment = lab.environment("", {"SCRIPTED_TRAINER": '{"hold": "/nonexistent/go on"}'})
    leader = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    daemon = subprocess.Popen(
        [sys.executable, "-S", "-c", leader, *command], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    log = lab.study.trial(1).training_log
    wait_until(lambda: log.exists() and "scripted: 1" in log.read_text(), PATIENCE_S, "it does not train")
    os.close(terminal)  # as closing its window does: SIGHUP, and every write fails
    os.kill(daemon.pid, signal.SIGHUP)  # shells send another one
    assert daemon.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert lab.processes() == {}
    assert (state(lab, 1).state, read_model(lab.study.run, Run).status) == ("interrupted", "stopped")
    assert "Traceback" not in lab.log()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_killed_writers_left_is_gone_after_the_next_run(lab):
    assert lab.optimizer("--n-trials", 1).wait(PATIENCE_S) == 0
    trial = lab.study.trial(1)
    folders = [lab.study.root, trial.folder, trial.final_evaluation.folder, lab.study.results.folder,
               lab.study.requests("optimizer")]  # fmt: skip
    gone = ProcessIdentity(99_999_999, 1, "")
    left = [folder / f".state.json.tmp-{gone.pid}-{gone.start_ticks}-0123abcd" for folder in folders]
    for path in left:
        path.write_text("half")
    lab.study.results.all_trials.unlink()
    assert lab.optimizer("--n-trials", 1).wait(PATIENCE_S) == 0
    assert [path for path in left if path.exists()] == []
    assert violations(lab.study, finished=1) == []
