"""A running training that is losing is ended by its own scores, for good, whatever is killed on the way."""

from __future__ import annotations

import json
import signal

import optuna
import pytest

from shared.files import read_model
from shared.locks import FileLock
from shared.schemas import AllTrials, TrialState
from tests.optimizer_daemon import scripted_evaluator
from tests.scenarios.lab import wait_until
from tests.scenarios.quick_lab import NEVER, PATIENCE_S, QuickLab

EPOCHS = ("--max-epochs", 8, "--save-every-n-epochs", 1, "--sampler", "random")
BAD = 6


@pytest.fixture
def lab(tmp_path):
    """Five finished trials, and a sixth in line that the scripted trainer gives a bad score from its first epoch on."""
    with QuickLab(tmp_path) as lab:
        daemon = lab.optimizer("--n-trials", BAD - 1, *EPOCHS)
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
        trials = read_model(lab.study.results.all_trials, AllTrials).trials
        rates = [float(trial.parameters["learning_rate"]) for trial in trials]
        values = {trial.value: rate for trial, rate in zip(trials, rates, strict=True)}
        worst = values[max(values)]
        asked = lab.ask("enqueue", f"learning_rate={worst}")
        assert asked.returncode == 0, asked.stderr
        yield lab


def trial_state(lab: QuickLab) -> TrialState:
    return read_model(lab.study.trial(BAD).state, TrialState)


def stored(lab: QuickLab) -> optuna.trial.FrozenTrial:
    trials = optuna.load_study(study_name=None, storage=f"sqlite:///{lab.study.database}").trials
    return trials[BAD - 1]


def score_its_first_epoch(lab: QuickLab, daemon) -> None:
    """As a manager's evaluator does, while the training goes on."""
    trial = lab.study.trial(BAD)
    wait_until(lambda: trial.list_checkpoints() or daemon.exit_status is not None, PATIENCE_S, daemon.said)
    scripted_evaluator.evaluate(trial)


def start(lab: QuickLab, *flags: object, **options: str):
    daemon = lab.optimizer("--n-trials", BAD, *EPOCHS, "--pruner-warmup-epochs", 1, *flags, hold=NEVER, **options)
    score_its_first_epoch(lab, daemon)
    return daemon


def ended_as_pruned(lab: QuickLab) -> None:
    state = trial_state(lab)
    assert state.state == "pruned"
    assert state.reason.startswith("worse than the median of its peers at 12% of the training: ")
    assert [point.epoch for point in state.curve] == [1]
    assert state.value is None
    assert state.imputed_value < state.curve[0].value, "its peers' scores fell from there to their ends"
    trial = stored(lab)
    assert trial.state is optuna.trial.TrialState.PRUNED
    assert trial.user_attrs["reason"] == state.reason
    assert not FileLock.is_held(lab.study.trial(BAD).trainer_lock), "nothing of the training lives"
    assert lab.study.trial(BAD).list_training_states() == [], "and it will not go on"
    result = read_model(lab.study.results.all_trials, AllTrials).trials[BAD - 1]
    assert (result.state, result.reason) == ("pruned", state.reason)


def test_a_losing_training_is_stopped_while_it_trains_and_counts_as_finished(lab):
    daemon = start(lab)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    ended_as_pruned(lab)
    assert f"{BAD} of {BAD} trials of stage '8 epochs' are finished." in daemon.said
    assert f"trial pruned trial={BAD}" in lab.log().replace('"', "")
    status = lab.ask("status", "--json")
    assert json.loads(status.stdout)["finished"] == BAD


def test_killed_between_the_verdict_and_the_study_the_next_start_tells_it(lab):
    daemon = start(lab, failpoints="optimizer.pruned=kill")
    assert daemon.wait(PATIENCE_S) == -signal.SIGKILL, daemon.said
    assert stored(lab).state is optuna.trial.TrialState.RUNNING
    again = lab.optimizer("--n-trials", BAD, *EPOCHS)
    assert again.wait(PATIENCE_S) == 0, again.said
    ended_as_pruned(lab)


@pytest.mark.parametrize("flags", [("--pruner", "none"), ("--gpu-policy", "defer")])
def test_what_is_told_not_to_prune_lets_it_train(lab, flags):
    daemon = start(lab, *flags)
    wait_until(lambda: trial_state(lab).curve or daemon.exit_status is not None, PATIENCE_S, daemon.said)
    assert trial_state(lab).state == "training"
    assert daemon.stop(signal.SIGINT) == 130, daemon.said
    assert trial_state(lab).state == "interrupted"


def test_a_checkpoint_that_is_not_scored_yet_is_scored_before_the_study_is_told(lab):
    """Two checkpoints stand when the verdict falls; the second is scored by ourselves, for no manager lives."""
    daemon = lab.optimizer("--n-trials", BAD, *EPOCHS, "--pruner-warmup-epochs", 1, failpoints="optimizer.pruned=kill",
                           env={"SCRIPTED_TRAINER": json.dumps({"epoch_s": 0.7})})  # fmt: skip
    score_its_first_epoch(lab, daemon)
    assert daemon.wait(PATIENCE_S) == -signal.SIGKILL, daemon.said
    trial = lab.study.trial(BAD)
    later = trial.intermediate_checkpoint(7)
    later.write_bytes(trial.intermediate_checkpoint(1).read_bytes().replace(b'"ss_epoch": "1"', b'"ss_epoch": "7"'))
    again = lab.optimizer("--n-trials", BAD, *EPOCHS)
    assert again.wait(PATIENCE_S) == 0, again.said
    assert trial_state(lab).state == "pruned"
    assert {1, 7} <= {point.epoch for point in trial_state(lab).curve}
    assert 7 in stored(lab).intermediate_values


def test_a_training_that_ends_before_the_signal_takes_effect_is_scored(lab, tmp_path):
    go_on = tmp_path / "go_on"
    daemon = lab.optimizer("--n-trials", BAD, *EPOCHS, "--pruner-warmup-epochs", 1,
                           env={"SCRIPTED_TRAINER": json.dumps({"deaf": True, "hold": str(go_on)})})  # fmt: skip
    score_its_first_epoch(lab, daemon)
    scored = f"checkpoint scored trial={BAD} epoch=1"
    wait_until(lambda: scored in lab.log() or daemon.exit_status is not None, PATIENCE_S, daemon.said)
    go_on.touch()  # the daemon waits for it to heed SIGTERM
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    state = trial_state(lab)
    assert (state.state, state.reason) == ("complete", None)
    assert state.value is not None
    assert stored(lab).state is optuna.trial.TrialState.COMPLETE
