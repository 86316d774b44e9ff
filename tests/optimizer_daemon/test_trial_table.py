"""Results of a long study: written bit by bit and looked at in passing, always as if everything had been read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from optimizer_daemon import glance, trial_table
from optimizer_daemon.glance import look_at
from optimizer_daemon.results import all_trials, ranked, winner, write_results
from optimizer_daemon.status import study_status
from optimizer_daemon.trial_table import TrialTable
from shared.files import read_model, to_bytes, write_model
from shared.layout import StudyLayout
from shared.schemas import (
    AllTrials,
    CheckpointRecord,
    CurvePoint,
    EvaluationState,
    Quarantine,
    TrialParams,
    TrialState,
)

TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)
STATES = ["complete"] * 12 + ["pruned", "failed", "training"]


def write_trial(study: StudyLayout, number: int, state: str, value: float | None = None, **params) -> None:
    trial = study.trial(number)
    trial.folder.mkdir(parents=True, exist_ok=True)
    write_model(
        trial.params,
        TrialParams(
            trial=number, optuna_number=number - 1, parameters={"rate": 1e-05, "text": 'a "b"\nc\n    }é'},
            training_seed=1, **{"origin": "sampler", **params},
        ),
    )  # fmt: skip
    over = {"ended": TIME, "reason": "because\nof that"} if state != "training" else {}
    if state == "complete":
        over |= {"value": value, "feasible": number % 5 != 0, "reason": None if number % 5 else "failed its gate"}
    curve = (CurvePoint(epoch=2, value=0.5, checkpoint="c"),) if number % 2 else ()
    write_model(
        trial.state,
        TrialState(trial=number, optuna_number=number - 1, state=state, attempt=1, drawn=TIME, curve=curve, **over),
    )


@pytest.fixture
def study(tmp_path: Path) -> StudyLayout:
    study = StudyLayout(tmp_path)
    for number, state in enumerate(STATES, 1):
        write_trial(study, number, state, value=(number * 7 % 12) / 10)
    return study


def collected(study: StudyLayout, table: TrialTable) -> AllTrials:
    trials = all_trials(table, "s", "score", TIME)
    write_results(study, trials, table)
    return trials


def test_only_what_has_changed_is_read_and_the_file_is_the_same_as_written_whole(study, monkeypatch):
    table = TrialTable(study)
    assert study.results.folder.exists() is False
    trials = collected(study, table)
    assert study.results.all_trials.read_bytes() == to_bytes(trials)
    assert read_model(study.results.all_trials, AllTrials) == trials
    read: list[str] = []
    monkeypatch.setattr(
        trial_table, "read_model", lambda path, model: read.append(path.parent.name) or read_model(path, model)
    )
    write_trial(study, 15, "complete", 0.05)
    write_trial(study, 16, "training")
    trials = collected(study, table)
    assert sorted(set(read)) == ["trial_0015", "trial_0016"]
    assert study.results.all_trials.read_bytes() == to_bytes(trials)
    assert [trial.state for trial in trials.trials] == [*STATES[:-1], "complete", "training"]
    study.trial(3).state.write_text("damaged")
    assert [trial.trial for trial in collected(study, table).trials] == [1, 2, *range(4, 17)]


def test_a_value_that_could_not_be_read_again_is_not_written(study):
    table = TrialTable(study)
    trials = collected(study, table)
    before = study.results.all_trials.read_bytes()
    row = table.refresh()[0]
    object.__setattr__(row.result, "value", float("nan"))
    row.__dict__.pop("text", None)
    with pytest.raises(ValueError, match="JSON"):
        write_results(study, trials, table)
    assert study.results.all_trials.read_bytes() == before


def whole_look(study: StudyLayout) -> AllTrials:
    return all_trials(TrialTable(study), "s", "score", TIME)


def test_a_look_shows_what_reading_everything_shows(study, monkeypatch):
    write_trial(study, 16, "complete", 0.9, origin="finalist", finalist_of=4)
    write_trial(study, 17, "complete", 0.8, origin="enqueued")
    collected(study, TrialTable(study))
    read: list[str] = []
    monkeypatch.setattr(glance, "read_model", lambda path, model: read.append(path.name) or read_model(path, model))
    everything = whole_look(study)
    look = look_at(study, 3)
    assert read == ["params.json", "trial_state.json"], "only of the one under way"
    assert (look.finished, look.failed) == (15, 1)
    shown = everything.model_copy(update={"trials": look.shown})
    assert ranked(shown)[:3] == ranked(everything)[:3]
    assert winner(shown) == winner(everything)
    assert len(look.shown) < len(everything.trials)
    assert {trial.trial for trial in look.shown} >= {15, 16, 17, 4}
    assert look_at(study, None).shown == everything.trials


def test_a_look_knows_which_stage_was_searched_after_a_finalist(study):
    write_trial(study, 16, "complete", 0.9, stage="15 epochs")
    write_trial(study, 17, "complete", 0.95, origin="finalist", finalist_of=16, stage="15 epochs")
    write_trial(study, 18, "complete", 0.97)
    collected(study, TrialTable(study))
    everything, look = whole_look(study), look_at(study, 1)
    shown = everything.model_copy(update={"trials": look.shown})
    assert look.finished_by_stage == {None: look.finished - 2, "15 epochs": 2}
    assert winner(shown) == winner(everything)
    assert winner(shown).trial == 17, "an earlier stage was raised, no more"


@pytest.mark.parametrize("change", ["later", "damaged", "gone", "results gone", "results damaged"])
def test_what_is_younger_than_the_results_or_not_in_them_is_read_itself(study, change):
    collected(study, TrialTable(study))
    if change == "later":
        write_trial(study, 1, "complete", 0.001)
    elif change == "damaged":
        study.trial(1).state.write_text("damaged")
    elif change == "gone":
        study.trial(1).params.unlink()
    elif change == "results gone":
        study.results.all_trials.unlink()
    else:
        study.results.all_trials.write_bytes(study.results.all_trials.read_bytes().replace(b"complete", b"pruned"))
    look, everything = look_at(study, 20), whole_look(study)
    assert ranked(everything.model_copy(update={"trials": look.shown})) == ranked(everything)
    assert [trial.trial for trial in look.shown if trial.state == "training"] == [15]
    assert len(look.damaged) == (change == "damaged")
    assert look.finished == sum(trial.state in ("complete", "pruned") for trial in everything.trials)


def test_an_unfit_checkpoint_of_a_trial_that_is_over_is_told(study):
    study.trial(2).evaluations.folder.mkdir()
    record = CheckpointRecord(
        checkpoint="lora_trial_2-000002", checkpoint_sha256=None, plan_hash="b" * 64, epoch=2, size=1, modified_ns=1,
        status="quarantined", quarantine=Quarantine(code="not_finite", reason="3 values are NaN", since=TIME),
    )  # fmt: skip
    write_model(
        study.trial(2).evaluations.state,
        EvaluationState(trial_name="trial_0002", updated=TIME, checkpoints=(record,)),
    )
    study.trial(3).evaluations.folder.mkdir()
    write_model(
        study.trial(3).evaluations.state, EvaluationState(trial_name="trial_0003", updated=TIME, checkpoints=())
    )
    collected(study, TrialTable(study))
    assert [trial.name for trial in look_at(study, 3).suspects] == ["trial_0002", "trial_0015"]
    (found,) = study_status(study, 3)["quarantined"]
    assert (found["trial"], found["code"]) == ("trial_0002", "not_finite")
