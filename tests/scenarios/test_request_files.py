"""Commands to a living daemon, to a dead one, and to one that dies over them: each is carried out once."""

from __future__ import annotations

import json
import signal

import optuna
import pytest

from shared.files import read_model
from shared.locks import FileLock
from shared.requests import RequestFolder
from shared.schemas import Enqueue, Run, Stop, TrialParams, TrialState
from tests.scenarios.invariants import violations
from tests.scenarios.lab import wait_until
from tests.scenarios.quick_lab import NEVER, PATIENCE_S, QuickLab

ASKED = {"learning_rate": 0.001, "network_dim": 8, "network_alpha": 4, "optimizer_type": "AdamW", "max_train_epochs": 2}


@pytest.fixture
def lab(tmp_path):
    with QuickLab(tmp_path) as lab:
        yield lab


def params(lab: QuickLab, number: int) -> TrialParams:
    return read_model(lab.study.trial(number).params, TrialParams)


def trials(lab: QuickLab) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="lora_study", storage=read_model(lab.study.run, Run).storage).trials


@pytest.mark.timeout(1800)
def test_a_running_study_is_paused_extended_given_a_configuration_and_stopped(lab):
    hold = lab.folder / "go on"
    daemon = lab.optimizer("--n-trials", 1, hold=str(hold))
    lab.wait_for_training(1, daemon)

    paused = lab.ask("pause")
    assert (paused.returncode, paused.stdout.startswith("paused")) == (0, True), paused.stderr
    changed = lab.ask("set", "n-trials=2")
    assert (changed.returncode, changed.stdout) == (0, "set: n-trials 2, until this run ends\n")
    assert read_model(lab.study.run, Run).settings["n-trials"] == 2
    refused = lab.ask("set", "seed=7")
    assert (refused.returncode, "only n-trials and timeout can change" in refused.stderr) == (2, True)
    enqueued = lab.ask("enqueue", "learning_rate=0.001", "network_dim=8", "max_train_epochs=2", "--training-seed", 5)
    assert (enqueued.returncode, "enqueued: trial 2 " in enqueued.stdout) == (0, True), enqueued.stderr
    unfit = lab.ask("enqueue", "learning_rate=9", "colour=red")
    assert unfit.returncode == 2
    assert "learning_rate: " in unfit.stderr
    assert "there is no parameter colour" in unfit.stderr

    hold.touch()
    wait_until(lambda: "trial ended" in lab.log(), PATIENCE_S, "the paused daemon ends what it had begun")
    assert not lab.study.trial(2).folder.exists(), "paused"
    hold.unlink()
    assert lab.ask("resume").returncode == 0
    lab.wait_for_training(2, daemon)
    asked = params(lab, 2)
    assert {name: asked.parameters[name] for name in ("learning_rate", "network_dim", "max_train_epochs")} == {
        "learning_rate": 0.001, "network_dim": 8, "max_train_epochs": 2
    }  # fmt: skip
    assert (asked.origin, asked.training_seed) == ("enqueued", 5)

    stopped = lab.ask("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped: 1 of 2 trials are finished\n")
    assert daemon.wait(PATIENCE_S) == 0
    assert lab.trainers() == {}
    assert read_model(lab.study.trial(2).state, TrialState).state == "interrupted"

    assert lab.optimizer("--n-trials", 2).wait(PATIENCE_S) == 0
    assert violations(lab.study, finished=2) == []


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "place",
    [
        "requests.carried_out",
        pytest.param("requests.found", marks=pytest.mark.slow),
        pytest.param("requests.answered", marks=pytest.mark.slow),
    ],
)
def test_a_daemon_killed_over_a_request_carries_it_out_once(lab, place):
    """Two requests at once: what was asked first is enqueued once, what was asked then stops the study once."""
    lab.study.root.mkdir()
    folder = RequestFolder(lab.study, "optimizer")
    enqueue = folder.submit(Enqueue(kind="enqueue", parameters=ASKED))
    stop = folder.submit(Stop(kind="stop"))
    daemon = lab.optimizer("--n-trials", 1, failpoints=f"{place}=kill")
    assert daemon.wait(PATIENCE_S) == -signal.SIGKILL, daemon.said
    daemon = lab.optimizer("--n-trials", 1, failpoints="requests.carried_out=kill@2", hold=NEVER)
    ended = daemon.wait(PATIENCE_S)
    if place == "requests.answered":  # the first one needs no second answer
        assert ended == 0, daemon.said
    else:
        assert ended == -signal.SIGKILL, daemon.said
        daemon = lab.optimizer("--n-trials", 1, hold=NEVER)
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert len([trial for trial in trials(lab) if trial.user_attrs["draw"].get("request") == enqueue]) == 1
    answers = [folder.wait_for_answer(request, 0) for request in (enqueue, stop)]
    assert [answer is not None and answer.ok for answer in answers] == [True, True]
    assert folder.pending() == []
    assert lab.optimizer("--n-trials", 1).wait(PATIENCE_S) == 0
    assert violations(lab.study, finished=len(trials(lab))) == []
    assert params(lab, 1).parameters == ASKED


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_a_daemon_the_verb_does_it_or_says_that_none_runs(lab):
    for words in (["pause"], ["enqueue", "network_dim=8"], ["stop"]):
        none = lab.ask(*words)
        assert (none.returncode, "holds no study (no run.json)" in none.stderr) == (2, True), none.stderr

    daemon = lab.optimizer("--n-trials", 1, hold=NEVER)
    lab.wait_for_training(1, daemon)
    daemon.kill()
    assert FileLock.is_held(lab.study.trial(1).trainer_lock), "the training lives on"
    for verb, said in {"pause": "nothing to pause", "resume": "nothing to resume"}.items():
        refused = lab.ask(verb)
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
    stopped = lab.ask("stop")
    assert (stopped.returncode, "trainings it had left were ended: 1" in stopped.stdout) == (0, True), stopped.stderr
    assert lab.processes() == {}
    assert read_model(lab.study.trial(1).state, TrialState).state == "interrupted"
    assert read_model(lab.study.run, Run).status == "stopped"
    enqueued = lab.ask("enqueue", *(f"{name}={json.dumps(value)}" for name, value in ASKED.items()))
    assert (enqueued.returncode, "enqueued: trial 2 " in enqueued.stdout) == (0, True), enqueued.stderr

    assert lab.optimizer("--n-trials", 1).wait(PATIENCE_S) == 0, "what was asked for is run beyond the number of trials"
    assert violations(lab.study, finished=2) == []
    assert (params(lab, 2).parameters, params(lab, 2).origin) == (ASKED, "enqueued")
