"""The best configurations are trained again at a stage's end: once each, whatever is killed, and the winner is one."""

from __future__ import annotations

import signal

import pytest

from optimizer_daemon.status import status_text, study_status
from shared.files import read_model
from shared.schemas import AllTrials, BestParameters, TrialParams, TrialResult
from tests.optimizer_daemon import scripted_evaluator
from tests.scenarios.invariants import violations
from tests.scenarios.lab import wait_until
from tests.scenarios.quick_lab import PATIENCE_S, QuickLab

FLAGS = ("--finalists", 2, "--sampler", "random", "--max-epochs", 2)
KILLED_AT = ["finalist_in_line", "asked", "params_written", "published", "told"]


@pytest.fixture
def lab(tmp_path):
    with QuickLab(tmp_path) as lab:
        yield lab


def run(lab: QuickLab, trials: int, *flags: object) -> str:
    daemon = lab.optimizer("--n-trials", trials, *FLAGS, *flags)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    return daemon.said


def results(lab: QuickLab) -> list[TrialResult]:
    return list(read_model(lab.study.results.all_trials, AllTrials).trials)


def best_of(trials: list[TrialResult], count: int) -> list[int]:
    return [trial.trial for trial in sorted(trials, key=lambda trial: trial.value)[:count]]


def seed_of(lab: QuickLab, number: int) -> int:
    return read_model(lab.study.trial(number).params, TrialParams).training_seed


def test_the_last_trials_repeat_the_best_and_a_larger_target_makes_new_ones(lab):
    said = run(lab, 4)
    trials = results(lab)
    searched, finalists = trials[:2], trials[2:]
    assert [trial.finalist_of for trial in trials] == [None, None, *best_of(searched, 2)]
    for trial in finalists:
        original = trials[trial.finalist_of - 1]
        assert trial.parameters == original.parameters
        assert seed_of(lab, trial.trial) != seed_of(lab, original.trial) == 42
        assert trial.value != original.value, "it is a measurement of its own"
    (winner,) = best_of(finalists, 1)
    best = read_model(lab.study.results.best_parameters, BestParameters)
    of = trials[winner - 1].finalist_of
    assert (best.trial, best.finalist_of, best.first_value) == (winner, of, trials[of - 1].value)
    sentence = f"a finalist: the configuration of trial {of}, which had {best.first_value:.4f}"
    assert f"Winner: trial {winner}, " in said
    assert sentence in said
    status = study_status(lab.study, 10)
    assert status["best"] == winner
    assert sentence in status_text(status)

    run(lab, 7)
    trials = results(lab)
    assert [trial.origin for trial in trials] == ["sampler"] * 2 + ["finalist"] * 2 + ["sampler"] + ["finalist"] * 2
    assert read_model(lab.study.results.best_parameters, BestParameters).trial in (6, 7)
    assert len({seed_of(lab, number) for number in (1, 3, 4, 6, 7)}) == 5
    assert violations(lab.study, finished=7) == []


@pytest.mark.timeout(1800)
def test_killed_at_every_place_of_a_finalist_none_is_made_twice_or_replaced(lab):
    run(lab, 2, "--finalists", 0)
    for place in KILLED_AT:
        daemon = lab.optimizer("--n-trials", 4, *FLAGS, failpoints=f"optimizer.{place}=kill")
        assert daemon.wait(PATIENCE_S) == -signal.SIGKILL, f"{place}: {daemon.said}"
    run(lab, 4)
    assert [trial.finalist_of for trial in results(lab)] == [None, None, *best_of(results(lab)[:2], 2)]
    assert violations(lab.study, finished=4) == []


def test_a_finalist_is_never_stopped_by_its_scores(lab):
    """A peer's best configuration may be everybody's worst the second time; its whole score is wanted."""
    epochs = ("--sampler", "random", "--max-epochs", 8, "--pruner-warmup-epochs", 1)
    daemon = lab.optimizer("--n-trials", 5, *epochs, "--pruner", "none")
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    worst = best_of(results(lab), 5)[-1]
    assert lab.ask("enqueue", "--finalist-of", worst).returncode == 0
    daemon = lab.optimizer("--n-trials", 6, *epochs, hold=str(lab.folder / "go on"))
    trial = lab.study.trial(6)
    wait_until(lambda: trial.list_checkpoints() or daemon.exit_status is not None, PATIENCE_S, daemon.said)
    scripted_evaluator.evaluate(trial)
    wait_until(lambda: "checkpoint scored trial=6" in lab.log() or daemon.exit_status is not None, PATIENCE_S)
    (lab.folder / "go on").touch()
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert results(lab)[5].state == "complete"


def test_with_two_trainings_at_once_the_finalists_wait_for_every_score_and_then_run_side_by_side(lab):
    daemon = lab.optimizer("--n-trials", 5, *FLAGS, "--jobs", 2)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    trials = results(lab)
    finalists = trials[3:]
    assert [trial.finalist_of for trial in trials] == [None, None, None, *best_of(trials[:3], 2)]
    assert min(trial.started for trial in finalists) >= max(trial.ended for trial in trials[:3])
    assert max(trial.started for trial in finalists) <= min(trial.ended for trial in finalists)
