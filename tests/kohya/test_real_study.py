"""A whole study with the real sd-scripts: both daemons, three trials, every checkpoint scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from shared.files import read_model
from shared.layout import StudyLayout
from shared.safetensors_file import read_checkpoint
from shared.schemas import AllTrials, BestParameters, EvaluationState, Metrics, Run, TrainerExit, TrialState
from tests.kohya.kohya_lab import KohyaLab
from tests.kohya.narrow_world import NarrowWorld
from tests.scenarios.lab import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRIALS, EPOCHS = 3, 4


@pytest.fixture(scope="module")
def finished(world: NarrowWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyLayout, str, str]:
    """The study's folder, and what the two daemons said."""
    with KohyaLab(tmp_path_factory.mktemp("study"), world, epochs=EPOCHS) as lab:
        manager = lab.manager("--exit-when-finished")
        optimizer = lab.optimizer("--n-trials", TRIALS)
        assert optimizer.wait(1500) == 0, optimizer.said
        assert manager.wait(240) == 0, manager.said
        wait_until(lambda: not lab.processes(), 60, "a process of the study lives on")
        print(optimizer.said, manager.said)
        return lab.study, optimizer.said, manager.said


def test_every_trial_is_complete(finished: tuple[StudyLayout, str, str]):
    study, said, _ = finished
    assert read_model(study.run, Run).status == "finished"
    states = [read_model(trial.state, TrialState) for trial in study.list_trials()]
    assert [(state.state, state.attempt, state.resumes) for state in states] == [("complete", 1, 0)] * TRIALS
    assert "Winner: trial" in said
    rows = read_model(study.results.all_trials, AllTrials).trials
    assert sorted(row.trial for row in rows) == [1, 2, 3]


def test_the_report_tells_of_these_trials(finished: tuple[StudyLayout, str, str]):
    study, said, _ = finished
    rows = {row.trial: row for row in read_model(study.results.all_trials, AllTrials).trials}
    best = read_model(study.results.best_parameters, BestParameters)
    assert f"Winner: trial {best.trial}, {best.objective} {best.value:.4f}" in said
    assert best.value == min(row.value for row in rows.values() if row.value is not None and row.feasible is not False)
    assert (best.parameters, best.epoch) == (rows[best.trial].parameters, EPOCHS)
    weights = read_checkpoint(study.root / str(best.checkpoint), study.trial(best.trial).folder)
    assert weights.sha256 == best.checkpoint_sha256
    for plot in (study.results.optimization_history, study.results.param_importances):
        with Image.open(plot) as picture:
            assert min(picture.size) > 100
            assert picture.convert("L").getextrema()[0] < 255, "nothing is drawn"
    for trial in study.list_trials():
        metrics = read_model(trial.final_evaluation.metrics, Metrics)
        assert metrics.checkpoint == trial.output_name
        score = metrics.scores[best.objective].value
        assert score == rows[trial.number or 0].value
        assert f"{score:.4f}" in trial.final_evaluation.text_summary.read_text()
        assert [(trial.final_evaluation.folder / Path(one.file).name).is_file() for one in metrics.samples] == [
            True
        ] * 2


def test_an_intermediate_and_the_final_checkpoint_of_each_trial_are_scored(finished: tuple[StudyLayout, str, str]):
    study, _, _ = finished
    for trial in study.list_trials():
        names = [f"{trial.output_name}-000002", trial.output_name]
        assert sorted(path.stem for path in trial.list_checkpoints()) == sorted(names)
        records = read_model(trial.evaluations.state, EvaluationState).checkpoints
        attempts = {record.checkpoint: [attempt.outcome for attempt in record.attempts] for record in records}
        assert attempts == {name: ["recorded"] for name in names}
        curve = read_model(trial.state, TrialState).curve
        assert [(point.epoch, point.checkpoint) for point in curve] == [(2, names[0]), (EPOCHS, names[1])]
        print(trial.name, [(point.epoch, round(point.value, 4)) for point in curve])


def test_the_script_was_started_directly_on_each_trials_own_file(
    finished: tuple[StudyLayout, str, str], world: NarrowWorld
):
    study, _, _ = finished
    for trial in study.list_trials():
        config = trial.folder / "train_config.toml"
        command = read_model(trial.trainer_exit, TrainerExit).command
        assert tuple(command) == (
            world.python,
            str(world.checkout / "train_network.py"),
            "--config_file",
            str(config),
        )
        assert f'output_name = "{trial.output_name}"' in config.read_text()


def test_no_state_outlives_its_trial_and_nothing_is_written_beside_the_pictures(
    finished: tuple[StudyLayout, str, str], world: NarrowWorld
):
    study, _, _ = finished
    assert [path.name for trial in study.list_trials() for path in trial.folder.glob("*-state")] == []
    beside = {path.suffix for path in (world.dataset.parent / "images").iterdir()}
    assert beside == {".png", ".txt"}, "kohya's latents lie beside the links"


def test_the_log_says_how_far_each_training_was(finished: tuple[StudyLayout, str, str]):
    study, _, _ = finished
    for trial in study.list_trials():
        text = trial.training_log.read_text(errors="replace")
        assert [f"epoch {number}/{EPOCHS}" in text for number in range(1, EPOCHS + 1)] == [True] * EPOCHS
