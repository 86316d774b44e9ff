"""retry: quarantines are lifted under the trial's lock, by whoever is there, and twice is as good as once."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from evaluator_daemon.commands import lift
from shared.errors import AlreadyRunningError, UserError
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.requests import RequestFolder
from shared.schemas import (
    Attempt,
    CheckpointRecord,
    Evaluate,
    EvaluationState,
    EvaluatorManagerState,
    Quarantine,
    Retry,
)

TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)
STRIKE = Attempt(started=TIME, ended=TIME, outcome="strike", reason="CUDA error")
RECORDED = Attempt(started=TIME, ended=TIME, outcome="recorded")


def record(name: str, status: str, attempts: tuple[Attempt, ...] = (), code: str | None = None) -> CheckpointRecord:
    quarantine = None if code is None else Quarantine(code=code, reason="it is so", since=TIME)
    return CheckpointRecord(
        checkpoint=name, checkpoint_sha256="a" * 64, plan_hash="b" * 64, epoch=1, size=1, modified_ns=1,
        status=status, attempts=attempts, quarantine=quarantine,
    )  # fmt: skip


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    study = StudyLayout(tmp_path)
    study.trial(5).evaluations.folder.mkdir(parents=True)
    records = (
        record("good", "recorded", (RECORDED,)),
        record("bad", "quarantined", (STRIKE,) * 3, "three_strikes"),
        record("short", "truncated"),
        record("shaky", "waiting", (STRIKE,)),
    )
    state = EvaluationState(trial_name="trial_0005", updated=TIME, checkpoints=records)
    write_model(study.trial(5).evaluations.state, state)
    return study


def statuses(study: StudyLayout) -> dict[str, tuple[str, int]]:
    records = read_model(study.trial(5).evaluations.state, EvaluationState).checkpoints
    return {known.checkpoint: (known.status, len(known.attempts)) for known in records}


def retry(checkpoint: str | None = None, trial: str = "trial_0005") -> Retry:
    return Retry(kind="retry", trial_name=trial, checkpoint=checkpoint)


LIFTED = ("waiting", 0)
GOOD = {"good": ("recorded", 1)}


@pytest.mark.parametrize(
    ("checkpoint", "lifted"),
    [
        pytest.param(None, ["bad", "short", "shaky"], id="all of the trial"),
        pytest.param("bad", ["bad"], id="one"),
        pytest.param("short.safetensors", ["short"], id="one by its file's name"),
        pytest.param("good", [], id="one that is recorded"),
    ],
)
def test_verdicts_and_strikes_are_forgotten_and_results_stay(study, checkpoint, lifted):
    before = statuses(study)
    assert lift(study, retry(checkpoint))["checkpoints"] == len(lifted)
    assert statuses(study) == before | dict.fromkeys(lifted, LIFTED)
    assert lift(study, retry(checkpoint))["checkpoints"] == 0, "twice is as good as once"
    assert statuses(study) == before | dict.fromkeys(lifted, LIFTED)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        pytest.param(retry(trial="trial_0006"), "holds no trial 'trial_0006'; its trials: trial_0005", id="no trial"),
        pytest.param(retry(trial="../trial_0005"), "holds no trial", id="outside the study"),
        pytest.param(retry("worse"), "has no checkpoint 'worse'; its checkpoints: bad, good, ", id="no checkpoint"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(study, command, says):
    with pytest.raises(UserError) as caught:
        lift(study, command)
    assert says in str(caught.value)


def test_a_label_outside_the_trials_is_lifted_too(study):
    label = study.evaluations("mine")
    label.folder.mkdir(parents=True)
    records = (record("bad", "quarantined", (STRIKE,) * 3, "three_strikes"),)
    write_model(label.state, EvaluationState(trial_name="mine", updated=TIME, checkpoints=records))
    assert lift(study, retry(trial="mine"))["message"] == "mine: bad evaluated again"
    assert read_model(label.state, EvaluationState).checkpoints[0].status == "waiting"
    with pytest.raises(UserError, match=r"its trials: trial_0005; its labels: mine"):
        lift(study, retry(trial="yours"))


def test_nothing_is_written_while_an_evaluator_holds_the_trial(study):
    before = study.trial(5).evaluations.state.read_bytes()
    with FileLock(study.trial(5).evaluations.lock), pytest.raises(AlreadyRunningError):
        lift(study, retry())
    assert study.trial(5).evaluations.state.read_bytes() == before


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evaluator_daemon.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.timeout(600)
def test_the_verb_works_with_and_without_a_manager_and_the_manager_keeps_what_needs_a_plan(study):
    done = run("retry", 5, "bad", "--optimization-dir", study.root)
    assert (done.returncode, done.stdout) == (0, "trial_0005: bad evaluated again\n"), done.stderr
    wrong = run("retry", "trial_0007", "--optimization-dir", study.root)
    assert (wrong.returncode, "holds no trial 'trial_0007'" in wrong.stderr) == (2, True), wrong.stderr

    half = study.requests("evaluator") / ".20251115T102345.000000Z-a.json.tmp-99999999-1-0123abcd"
    half.write_text("{")
    manager = subprocess.Popen(
        [sys.executable, "-m", "evaluator_daemon.cli", "run", "--optimization-dir", str(study.root)],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while not study.manager_state.exists():
            assert time.monotonic() < deadline, "the manager does not come up"
            time.sleep(0.1)
        assert not half.exists()
        begin = time.monotonic()
        done = run("retry", 5, "--optimization-dir", study.root)
        assert (done.returncode, done.stdout) == (0, "trial_0005: short, shaky evaluated again\n"), done.stderr
        assert time.monotonic() - begin < 29, "a request wakes the manager"
        folder = RequestFolder(study, "evaluator")
        asked = folder.submit(Evaluate(kind="evaluate", file=None, label="base"))
        assert folder.wait_for_answer(asked, 1.0) is None, "there is no plan yet"
        assert read_model(study.manager_state, EvaluatorManagerState).status == "waiting"
        assert manager.poll() is None
    finally:
        manager.terminate()
        assert manager.wait(60) == 143
    assert statuses(study) == GOOD | dict.fromkeys(["bad", "short", "shaky"], LIFTED)
