"""What is seen of a study folder: every figure from files alone, damaged ones named, unchanged ones not read again."""

from __future__ import annotations

import json
import os
from datetime import timedelta

import pytest

from evaluator_daemon.gpu_probe import parse_gpus
from evaluator_daemon.overview import Gpu, Objective, Point, best_point, sorted_curve, to_json
from evaluator_daemon.snapshot import StudyReader
from evaluator_daemon.sparkline import sparkline
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.schemas import ActiveEvaluator, TrialParams, TrialState
from tests.evaluator_daemon.watched_study import (
    BAR,
    NOW,
    evaluating,
    file,
    quarantined,
    record,
    struck,
    write_bar,
    write_manager,
    write_metrics,
    write_records,
    write_run,
    write_scores,
    write_trial,
)

NO_GPU = ("/nonexistent/nvidia-smi",)
LOWER, HIGHER = Objective(), Objective("combined_score", "maximise")


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    return StudyLayout(tmp_path / "study")


def look(study, **options):
    return StudyReader(study, nvidia_smi=NO_GPU, **options).look(NOW)


def by_number(overview):
    return {trial.number: trial for trial in overview.trials}


# ------------------------------------------------------------------------------------------------------- the whole tree


def test_a_study_in_the_middle(study):
    write_run(study)
    write_trial(study, 1, "complete", [0.5, 0.42, 0.31, 0.33])
    write_trial(study, 2, "pruned", [0.9, 0.95])
    write_trial(study, 3, "failed", reason="out of memory")
    training = write_trial(study, 4, "training", [0.41, 0.27], waiting=1)
    write_bar(training, 40, 64)
    with FileLock(study.optimizer_lock), FileLock(training.trainer_lock):
        overview = look(study)
    assert (overview.study, overview.status) == ("pixar", "running")
    assert (overview.optimizer_alive, overview.evaluator_alive) == (True, False)
    assert (overview.target, overview.finished, overview.failed) == (20, 2, 1)
    assert overview.unreadable == ()
    trials = by_number(overview)
    assert [(t.epochs_done, t.epochs, t.scored, t.checkpoints_expected) for t in trials.values()] == [
        (6, 8, 2, 4), (8, 8, 4, 4), (4, 8, 2, 4), (0, 8, 0, 4)
    ]  # fmt: skip
    assert trials[4].training is not None
    assert (trials[4].training.seconds_per_step, trials[4].training.eta_s) == (23.48, 328.0)
    assert trials[4].trainer_alive
    assert trials[1].best == Point("lora_trial_1-000006", 6, 0.31, True)
    assert overview.winner == "trial_0001"
    assert overview.best is not None
    assert (overview.best.trial, overview.best.checkpoint) == ("trial_0004", "lora_trial_4-000004.safetensors")
    assert (overview.best.epoch, overview.best.score, overview.best.file_exists) == (4, 0.27, True)
    assert not overview.best.final
    assert overview.last_error is not None
    assert (overview.last_error.place, overview.last_error.text) == ("trial_0003", "failed: out of memory")


def test_it_is_json_with_times_that_have_an_offset(study):
    write_run(study)
    write_trial(study, 1, "complete", [0.5, 0.42, 0.31, 0.33])
    shown = json.loads(json.dumps(to_json(look(study)), allow_nan=False))
    assert shown["time"] == NOW.isoformat()
    assert shown["trials"][0]["scored"] == 4
    assert shown["trials"][0]["curve"][1] == {
        "checkpoint": "lora_trial_1-000004", "epoch": 4, "score": 0.42, "feasible": True
    }  # fmt: skip
    assert shown["trials"][0]["parameters"]["network_dim"] == 64
    assert shown["objective"] == {"name": "combined_score", "direction": "minimise"}


def test_a_folder_that_waits_for_its_study_and_one_that_is_gone(study):
    assert look(study).status == "gone"
    study.root.mkdir()
    assert look(study).status == "waiting for run.json"


def test_the_winner_is_named_from_the_finalists(study):
    write_run(study)
    write_trial(study, 1, "complete", [0.5, 0.5, 0.5, 0.2])
    again = write_trial(study, 2, "complete", [0.5, 0.5, 0.5, 0.3])
    assert look(study).winner == "trial_0001"
    params = read_model(again.params, TrialParams)
    write_model(again.params, params.model_copy(update={"origin": "finalist", "finalist_of": 1}))
    overview = look(study)
    assert overview.winner == "trial_0002", "its score is nobody's choice"
    assert by_number(overview)[2].finalist_of == 1


def test_any_trainers_folders_without_state_files(study):
    folder = study.root / "trial_of_mine"
    folder.mkdir(parents=True)
    (folder / "style-000003.safetensors").write_bytes(b"weights")
    overview = look(study)
    assert overview.status == "no run.json"
    (trial,) = overview.trials
    assert (trial.name, trial.number, trial.state, trial.checkpoints, trial.unscored) == (
        "trial_of_mine", None, None, 1, 1
    )  # fmt: skip
    assert (trial.epochs_done, trial.epochs, trial.checkpoints_expected) == (3, None, None)


def test_those_under_way_come_first_then_the_best_and_those_that_may_not_win_behind(study):
    write_run(study)
    write_trial(study, 1, "complete", [0.5, 0.5, 0.5, 0.5])
    write_trial(study, 2, "complete", [0.2, 0.3, 0.3, 0.1], failed_gate=(8,))
    write_trial(study, 3, "failed", reason="x")
    write_trial(study, 4, "complete", [0.4, 0.4, 0.4, 0.4])
    write_trial(study, 5, "trained", [0.9], waiting=3)
    write_trial(study, 6, "training", [0.95])
    overview = look(study)
    assert [trial.number for trial in overview.trials] == [6, 5, 4, 1, 2, 3]
    assert overview.winner == "trial_0004"
    assert overview.best is not None
    assert overview.best.score == 0.2, "a checkpoint stands for itself: its trial's final one failed the gate"


@pytest.mark.parametrize("direction", ["minimise", "maximise"])
def test_the_direction_is_the_one_the_score_was_measured_with(study, direction):
    write_run(study)
    write_metrics(write_trial(study, 1, "complete", [0.5, 0.2, 0.9, 0.4]), "lora_trial_1-000002", direction)
    overview = look(study)
    assert overview.objective.direction == direction
    assert overview.best is not None
    assert overview.best.score == (0.2 if direction == "minimise" else 0.9)


def test_scores_of_another_plan_or_of_weights_that_a_redo_took_away_do_not_count(study):
    run = write_run(study)
    trial = write_trial(study, 1, "training", [0.3, 0.2])
    file(trial, 1).unlink()
    assert [point.score for point in look(study).trials[0].curve] == [0.3]
    state = read_model(trial.state, TrialState)
    write_model(trial.state, state.model_copy(update={"deleted": (file(trial, 1).name,)}))
    overview = look(study)
    assert [point.score for point in overview.trials[0].curve] == [0.3, 0.2]
    assert overview.best is not None
    assert not overview.best.file_exists
    other = run.plan.model_copy(update={"steps": 3})
    write_model(study.run, run.model_copy(update={"plan": other, "plan_hash": other.digest()}))
    assert look(study).trials[0].curve == ()


# --------------------------------------------------------------------------------------------------- queue and liveness


def test_the_queue_is_the_living_managers_view(study):
    write_run(study)
    trial = write_trial(study, 1, "training", [0.4], waiting=2)
    write_records(trial, record(file(trial, 0).stem), evaluating(file(trial, 1).stem))
    at_work = ActiveEvaluator(trial_name=trial.name, pid=1, started=NOW, activity="evaluating", checkpoint="earlier")
    deferred = ActiveEvaluator(trial_name="trial_0002", pid=2, started=NOW, activity="deferred")
    write_manager(study, waiting_checkpoints=7, evaluators=(at_work, deferred), device="cuda")
    with FileLock(study.manager_lock), FileLock(trial.evaluations.lock):
        overview = look(study)
    assert (overview.queue.waiting, overview.queue.proven, overview.queue.deferred) == (7, True, 1)
    assert [(e.trial, e.activity, e.checkpoint) for e in overview.queue.evaluators] == [
        ("trial_0001", "evaluating", "lora_trial_1-000004"), ("trial_0002", "deferred", None)
    ]  # fmt: skip
    assert overview.device == "cuda"


def test_after_kill_9_nobody_is_at_work_whatever_the_files_say(study):
    write_run(study)
    trial = write_trial(study, 1, "training", [0.4], waiting=2)
    write_bar(trial, 1, 4)
    write_records(trial, record(file(trial, 0).stem), evaluating(file(trial, 1).stem))
    at_work = ActiveEvaluator(trial_name=trial.name, pid=1, started=NOW, activity="evaluating")
    write_manager(study, waiting_checkpoints=7, evaluators=(at_work,))
    for lock in (study.optimizer_lock, study.manager_lock, trial.trainer_lock, trial.evaluations.lock):
        lock.write_text("1 here then\n")
    overview = look(study)
    assert (overview.optimizer_alive, overview.evaluator_alive) == (False, False)
    assert (overview.queue.waiting, overview.queue.proven, overview.queue.evaluators) == (2, False, ())
    (seen,) = overview.trials
    assert (seen.state, seen.trainer_alive, seen.training, seen.scoring) == ("training", False, None, None)


# -------------------------------------------------------------------------------------------------- troubles and damage


def test_the_last_error_is_the_latest_of_logs_records_and_states(study):
    write_run(study)
    trial = write_trial(study, 1, "training", [0.4], waiting=2)
    write_records(
        trial,
        struck(file(trial, 0).stem, "CUDA error", NOW + timedelta(minutes=1)),
        quarantined(file(trial, 1).stem, "3 values are NaN", NOW + timedelta(minutes=2)),
    )
    overview = look(study)
    assert overview.quarantined == 1
    assert overview.last_error == overview.last_quarantine
    assert overview.last_quarantine is not None
    assert (overview.last_quarantine.place, overview.last_quarantine.text) == (
        "trial_0001 lora_trial_1-000004", "not_finite: 3 values are NaN"
    )  # fmt: skip
    late = (NOW + timedelta(minutes=3)).isoformat()
    study.manager_log.write_text(
        f'{late} WARNING evaluator ended trial=trial_0001 exit=-9\n{late} INFO evaluator started\nWARNING "not ours"\n'
    )
    last = look(study).last_error
    assert last is not None
    assert (last.place, last.text) == ("evaluator_manager.log", "evaluator ended trial=trial_0001 exit=-9")


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        pytest.param("run.json", "target", id="the run"),
        pytest.param("trial_0001/trial_state.json", "winner", id="a trial's state"),
        pytest.param("trial_0001/params.json", None, id="a trial's parameters"),
        pytest.param("trial_0001/realtime_evaluations/evaluation_summary.json", "best", id="a trial's scores"),
        pytest.param("trial_0001/realtime_evaluations/evaluation_state.json", None, id="the evaluator's memory"),
        pytest.param("evaluator_manager_state.json", "device", id="the manager's view"),
    ],
)
@pytest.mark.parametrize("content", [b"", b'{"half', b"\x00\xff" * 50, b"{}"], ids=["empty", "half", "noise", "other"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(study, name, lost, content):
    write_run(study)
    write_manager(study)
    write_trial(study, 1, "complete", [0.5, 0.42, 0.31, 0.33])
    path = study.root / name
    path.write_bytes(content)
    overview = look(study)
    (sentence,) = overview.unreadable
    assert sentence.startswith(f"{path}: ")
    assert [trial.number for trial in overview.trials] == [1]
    assert lost is None or getattr(overview, lost) is None
    assert path.read_bytes() == content, "whoever only looks changes nothing"
    json.dumps(to_json(overview), allow_nan=False)


def test_things_that_stand_at_a_files_name_or_cannot_be_opened_are_named_too(study):
    write_run(study)
    trial = write_trial(study, 1, "training", [0.4])
    trial.state.unlink()
    trial.state.mkdir()
    study.manager_state.symlink_to(study.manager_state)
    overview = look(study)
    assert len(overview.unreadable) == 2
    assert overview.trials[0].state is None


# ----------------------------------------------------------------------------------------------------------------- time


def test_the_work_left_is_the_mean_trial_for_each_missing_one_less_what_ran(study):
    write_run(study, n_trials=6)
    assert look(study).eta_s is None
    write_trial(study, 1, "complete", [0.1] * 4, minutes=40)
    write_trial(study, 2, "pruned", [0.1] * 2, minutes=20)
    write_trial(study, 3, "failed", minutes=500)
    assert look(study).eta_s == 4 * 30 * 60
    running = write_trial(study, 4, "training", minutes=10)
    assert look(study).eta_s == 4 * 30 * 60, "nobody trains"
    with FileLock(running.trainer_lock):
        assert look(study).eta_s == 4 * 30 * 60 - 10 * 60
    write_run(study, n_trials=2)
    assert look(study).eta_s == 0.0


@pytest.mark.parametrize(
    ("said", "epochs"),
    [
        ("encoding latents: 3/40", 0),
        (BAR.format(step=0, steps=64), 0),
        (BAR.format(step=15, steps=64), 1),
        (BAR.format(step=64, steps=64), 8),
        ("nothing we know", 0),
        ("", 0),
    ],
)
def test_epochs_done_follow_the_progress_bar(study, said, epochs):
    write_run(study)
    trial = write_trial(study, 1, "training")
    trial.training_log.write_text(f"loading\n{said}")
    with FileLock(trial.trainer_lock):
        assert look(study).trials[0].epochs_done == epochs


# ---------------------------------------------------------------------------------------------------------------- cheap


def test_of_200_finished_trials_only_what_changed_is_read_again(study):
    write_run(study, n_trials=300)
    for number in range(1, 201):
        write_trial(study, number, "complete", [0.5, 0.4, 0.3, 0.2 + number / 1000])
    reader = StudyReader(study, nvidia_smi=NO_GPU)
    first = reader.look(NOW)
    everything = reader.files_read
    assert everything >= 4 * 200
    assert reader.look(NOW) == first
    assert reader.files_read == everything
    write_scores(study.trial(7), [0.5, 0.4, 0.3, 0.01])  # two files
    again = reader.look(NOW)
    assert reader.files_read == everything + 2
    assert again.best is not None
    assert (again.best.trial, again.best.score, again.best.final) == ("trial_0007", 0.01, True)


def test_a_damaged_file_that_is_mended_is_read_again_even_at_the_same_time_and_size(study):
    write_run(study)
    reader = StudyReader(study, nvidia_smi=NO_GPU)
    whole, status = study.run.read_bytes(), study.run.stat()
    damaged = study.run.with_name("damaged")
    damaged.write_bytes(b"x" * len(whole))
    os.utime(damaged, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reader.look(NOW).unreadable == ()
    damaged.replace(study.run)  # as writers do: another inode
    assert len(reader.look(NOW).unreadable) == 1
    assert len(reader.look(NOW).unreadable) == 1, "known without being read again"
    write_run(study)
    assert reader.look(NOW).unreadable == ()


# ------------------------------------------------------------------------------------------------------------------ GPU


def test_what_nvidia_smi_prints(tmp_path, study):
    study.root.mkdir()
    lines = "0, NVIDIA GeForce RTX 4090, 8123, 24564, 97\n1, A100, MIG 1g.5gb, [N/A], 40960, [N/A]\n\nNo devices\n"
    expected = (Gpu(0, "NVIDIA GeForce RTX 4090", 8123, 24564, 97), Gpu(1, "A100, MIG 1g.5gb", None, 40960, None))
    assert parse_gpus(lines) == expected
    tool, calls = tmp_path / "nvidia-smi", tmp_path / "calls"
    tool.write_text(f"#!/bin/sh\necho called >> {calls}\ncat <<'END'\n{lines}END\n")
    tool.chmod(0o755)
    time = [100.0]
    reader = StudyReader(study, nvidia_smi=(str(tool),), clock=lambda: time[0])
    assert [reader.look(NOW).gpus for _ in range(3)] == [expected] * 3
    assert calls.read_text().count("called") == 1, "asked once in a while"
    tool.write_text("#!/bin/sh\nexit 9\n")
    time[0] += 5
    assert reader.look(NOW).gpus == ()


# --------------------------------------------------------------------------------------------------------------- curves

CURVE = (
    Point("a", 2, 0.9, True), Point("b", 4, 0.5, True), Point("c", 6, 0.1, False), Point("d", 8, None, None),
    Point("e", 10, 0.3, True), Point("f", 12, 0.4, None),
)  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "width", "drawn"),
    [(LOWER, 10, "93x?*1"), (LOWER, 3, "3x*"), (LOWER, 1, "*"), (HIGHER, 10, "*3x?01")],
)
def test_a_curve_marks_the_best_what_failed_and_what_is_missing(objective, width, drawn):
    best = best_point(CURVE, objective)
    marks = {"best_mark": "*", "failed_mark": "x", "gap_mark": "?"}
    assert sparkline(CURVE, best, objective, width, "0123456789", **marks) == drawn


def test_no_curve_and_a_flat_one():
    marks = {"best_mark": "*", "failed_mark": "x", "gap_mark": "?"}
    assert sparkline((), None, LOWER, 10, "01", **marks) == ""
    flat = (Point("a", 1, 0.5, True), Point("b", 2, 0.5, True))
    assert sparkline(flat, best_point(flat, LOWER), LOWER, 10, "01", **marks) == "*0"


def test_points_come_by_epoch_those_without_one_last():
    points = [Point("x", None, 1.0, True), Point("b", 10, 1.0, True), Point("a", 2, 1.0, True)]
    assert [point.checkpoint for point in sorted_curve(points)] == ["a", "b", "x"]
