"""A study of two objectives through the real daemon: kills on the way, the front at the end, no other objectives."""

from __future__ import annotations

import json
import signal

import optuna
import pytest

from shared.files import read_model
from shared.schemas import AllTrials, BestParameters, ParetoFront, TrialState
from tests.optimizer_daemon import scripted_evaluator
from tests.scenarios.lab import wait_until
from tests.scenarios.quick_lab import NEVER, PATIENCE_S, QuickLab

TRADE_OFF = {"SCRIPTED_TRADE_OFF": "1"}
TWO = ("--objectives", "brightness,contrast", "--sampler", "random")
KILLS = ("optimizer.draw_stored", "optimizer.reported", "optimizer.published", "optimizer.ended", "optimizer.told")
TRIALS = 4


@pytest.fixture
def lab(tmp_path):
    with QuickLab(tmp_path) as lab:
        yield lab


def stored(lab: QuickLab) -> optuna.Study:
    return optuna.load_study(study_name=None, storage=f"sqlite:///{lab.study.database}")


def run(lab: QuickLab, trials: int, *flags: object, code: int = 0, **options) -> str:
    options["env"] = {**TRADE_OFF, **options.get("env", {})}
    daemon = lab.optimizer("--n-trials", trials, *TWO, *flags, **options)
    assert daemon.wait(PATIENCE_S) == code, daemon.said
    return daemon.said


def dominates(one: dict[str, float], other: dict[str, float]) -> bool:
    return one != other and all(one[name] <= other[name] for name in one)


@pytest.mark.timeout(1800)
def test_killed_at_five_places_the_study_ends_with_its_front_and_its_knee(lab):
    for place in KILLS:
        run(lab, TRIALS, code=-signal.SIGKILL, failpoints=f"{place}=kill", env={"SCRIPTED_GATE": "3"})
    said = run(lab, TRIALS, env={"SCRIPTED_GATE": "3"})

    trials = read_model(lab.study.results.all_trials, AllTrials)
    assert [(known.name, known.direction, known.target) for known in trials.objectives] == [
        ("brightness", "minimise", 0.5), ("contrast", "minimise", 0.2)
    ]  # fmt: skip
    rows = {row.trial: row for row in trials.trials}
    assert sorted(rows) == [1, 2, 3, 4]
    for row in rows.values():
        scored = row.curve[-1].value
        assert row.values == pytest.approx({"brightness": scored, "contrast": abs(scored - 0.8)})
        assert row.curve[-1].values == row.values
        assert row.value == scored
    assert rows[3].feasible is False

    able = {number: row.values for number, row in rows.items() if number != 3}
    expected = {
        number for number, values in able.items() if not any(dominates(other, values) for other in able.values())
    }
    found = read_model(lab.study.results.pareto_front, ParetoFront)
    assert {member.trial for member in found.front} == expected
    assert [growth.trial for growth in found.history] == [1, 2, 4]
    assert found.hypervolume == found.history[-1].hypervolume > 0
    assert lab.study.results.pareto_front_picture.read_bytes().startswith(b"\x89PNG")
    best = read_model(lab.study.results.best_parameters, BestParameters)
    assert (best.trial, best.chosen_as, best.values) == (found.knee, "knee", rows[found.knee].values)

    assert f"Knee: trial {found.knee}, brightness {best.values['brightness']:.4f}" in said
    for member in found.front:
        assert f"{member.values['contrast']:.4f}  {lab.study.root / member.checkpoint}" in said
    status = json.loads(lab.ask("status", "--json").stdout)
    assert (
        status["front"]
        == [member.trial for member in found.front]
        == [row["trial"] for row in status["top"]][: len(found.front)]
    )
    text = lab.ask("status").stdout
    assert "(front, its knee)" in text
    assert "(failed its gate)" in text

    study = stored(lab)
    assert study.metric_names == ["brightness", "contrast"]
    for trial in study.trials:
        assert dict(zip(study.metric_names, trial.values, strict=True)) == rows[trial.number + 1].values
        assert trial.intermediate_values == {point.epoch: point.value for point in rows[trial.number + 1].curve}
    assert {trial.number + 1 for trial in study.best_trials} == expected

    # Lost with its trial's files: rebuilt from the database.
    before = read_model(lab.study.trial(1).state, TrialState)
    lab.study.trial(1).state.unlink()
    asked = lab.ask("enqueue", f"learning_rate={rows[1].parameters['learning_rate']}")
    assert asked.returncode == 0, asked.stderr
    run(lab, TRIALS + 1)
    after = read_model(lab.study.trial(1).state, TrialState)
    assert (after.value, after.objectives, after.curve) == (before.value, before.objectives, before.curve)
    assert read_model(lab.study.results.pareto_front, ParetoFront).history[-1].trial == TRIALS + 1

    refused = lab.optimizer("--n-trials", 9, "--sampler", "random", "--objectives", "brightness,saturation")
    assert refused.wait(PATIENCE_S) == 2
    assert "--objectives: brightness,contrast -> brightness,saturation" in refused.said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_losing_training_is_stopped_by_its_score_and_has_no_values(lab):
    epochs = ("--max-epochs", 8, "--pruner-warmup-epochs", 1)
    run(lab, 5, *epochs)
    rows = read_model(lab.study.results.all_trials, AllTrials).trials
    worst = max(rows, key=lambda row: row.value)
    assert lab.ask("enqueue", f"learning_rate={worst.parameters['learning_rate']}").returncode == 0
    daemon = lab.optimizer("--n-trials", 6, *TWO, *epochs, hold=NEVER, env=TRADE_OFF)
    trial = lab.study.trial(6)
    wait_until(lambda: trial.list_checkpoints() or daemon.exit_status is not None, PATIENCE_S, daemon.said)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SCRIPTED_TRADE_OFF", "1")
        scripted_evaluator.evaluate(trial)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    state = read_model(trial.state, TrialState)
    assert (state.state, state.value, state.objectives) == ("pruned", None, {})
    assert state.reason.startswith("worse than the median of its peers")
    assert state.curve[0].values.keys() == {"brightness", "contrast"}
    assert stored(lab).trials[5].values is None
    assert 6 not in [member.trial for member in read_model(lab.study.results.pareto_front, ParetoFront).front]
