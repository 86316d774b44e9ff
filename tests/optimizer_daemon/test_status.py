"""`optimizer-daemon status` of a study whose daemons are dead and whose files are partly damaged."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from optimizer_daemon.status import status_text, study_status
from shared.errors import UserError
from shared.files import write_model
from shared.layout import StudyLayout
from shared.requests import RequestFolder
from shared.schemas import CheckpointRecord, EvaluationState, Pause, Quarantine, TrialParams, TrialState

TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    """Trial 1 is complete, trial 2 interrupted with one quarantined checkpoint; a request waits."""
    study = StudyLayout(tmp_path)
    states = {
        1: {"state": "complete", "ended": TIME, "value": 0.25, "feasible": True},
        2: {"state": "interrupted", "reason": "stopped by request"},
    }
    for number, fields in states.items():
        trial = study.trial(number)
        trial.evaluations.folder.mkdir(parents=True)
        write_model(
            trial.params,
            TrialParams(trial=number, optuna_number=number - 1, parameters={"max_train_epochs": 4, "rate": 1e-4},
                        origin="sampler", training_seed=1),
        )  # fmt: skip
        write_model(trial.state, TrialState(trial=number, optuna_number=number - 1, attempt=1, drawn=TIME, **fields))
    bad = CheckpointRecord(
        checkpoint="lora_trial_2-000002", checkpoint_sha256=None, plan_hash="b" * 64, epoch=2, size=1, modified_ns=1,
        status="quarantined", quarantine=Quarantine(code="not_finite", reason="3 values are NaN", since=TIME),
    )  # fmt: skip
    state = EvaluationState(trial_name="trial_0002", updated=TIME, checkpoints=(bad,))
    write_model(study.trial(2).evaluations.state, state)
    RequestFolder(study, "optimizer").submit(Pause(kind="pause"))
    return study


def test_it_tells_what_is_interrupted_quarantined_and_asked_for_without_run_json(study):
    text = status_text(study_status(study, 10))
    assert "1 trials finished" in text
    assert "no daemon running, study unknown" in text
    assert "trial 2: interrupted, checkpoints 0/? (stopped by request)" in text
    assert "quarantined: trial_0002 lora_trial_2-000002: not_finite: 3 values are NaN" in text
    assert "open request to the optimizer daemon: " in text
    assert "damaged" not in text


@pytest.mark.parametrize(
    ("file", "lost"),
    [
        pytest.param("run.json", "pixar", id="the run"),
        pytest.param("trial_0002/trial_state.json", "interrupted", id="a trial's state"),
        pytest.param("trial_0001/params.json", "0.2500", id="a trial's parameters"),
        pytest.param(
            "trial_0002/realtime_evaluations/evaluation_state.json", "quarantined", id="the evaluator's state"
        ),
    ],
)
def test_a_damaged_file_is_named_once_and_the_rest_is_shown(study, file, lost):
    path = study.root / file
    path.write_bytes(b'{"half')
    status = study_status(study, 10)
    (sentence,) = status["damaged"]
    assert sentence.startswith(f"{path}: ")
    text = status_text(status)
    assert f"damaged: {path}: " in text
    assert lost not in text
    assert text.count("trial ") + text.count("trial_") >= 2, "the rest"
    assert path.read_bytes() == b'{"half', "whoever only looks changes nothing"


def test_an_empty_folder_is_no_study(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        study_status(StudyLayout(tmp_path), 10)
