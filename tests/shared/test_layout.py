"""The tree of a study folder: every path once, every path with one writer."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path, PurePosixPath

import pytest

from shared.layout import WRITERS, StudyLayout, TrialLayout, checkpoint_epoch, expected_checkpoints, matches, writer_of
from shared.schemas import DOCUMENTS

STUDY = StudyLayout(Path("study"))
TRIAL = STUDY.trial(5)
NOON = datetime(2025, 11, 15, 12, tzinfo=UTC)

TREE = [
    # path of the layout, where it must lie, who writes it
    (STUDY.database, "optuna_study.db", "optimizer"),
    (STUDY.run, "run.json", "optimizer"),
    (STUDY.optimizer_lock, "optimizer.lock", "optimizer"),
    (STUDY.optimizer_log, "optimization.log", "optimizer"),
    (STUDY.watch_script, "watch_realtime_evaluation.sh", "optimizer"),
    (STUDY.manager_lock, "evaluator_manager.lock", "manager"),
    (STUDY.manager_log, "evaluator_manager.log", "manager"),
    (STUDY.manager_state, "evaluator_manager_state.json", "manager"),
    (STUDY.request("optimizer", NOON, "7c1e"), "requests/optimizer/20251115T120000.000000Z-7c1e.json", "anybody"),
    (STUDY.request("evaluator", NOON, "7c1e"), "requests/evaluator/20251115T120000.000000Z-7c1e.json", "anybody"),
    (STUDY.answer(STUDY.request("optimizer", NOON, "7c1e")), "requests/optimizer/7c1e.done.json", "optimizer"),
    (STUDY.answer(STUDY.request("evaluator", NOON, "7c1e")), "requests/evaluator/7c1e.done.json", "manager"),
    (STUDY.base_render("ab" * 32).sample(0), "reference/abababababababab/sample_0.png", "evaluator"),
    (STUDY.base_render("ab" * 32).metrics, "reference/abababababababab/metrics.json", "evaluator"),
    (STUDY.baseline / "v6.safetensors", "baseline/v6.safetensors", "optimizer"),
    (STUDY.trainer_cache / "data" / "0" / "a.png", "trainer_cache/data/0/a.png", "optimizer"),
    (STUDY.trainer_cache / "data" / "0" / "a_sd.npz", "trainer_cache/data/0/a_sd.npz", "trainer"),
    (STUDY.evaluations("finalists").state, "evaluations/finalists/evaluation_state.json", "evaluator"),
    (STUDY.evaluations("finalists").plan, "evaluations/finalists/evaluation_plan.json", "evaluator"),
    (STUDY.evaluations("finalists").log, "evaluations/finalists/evaluation.log", "evaluator"),
    (STUDY.evaluations("finalists").lock, "evaluations/finalists/.lock", "evaluator"),
    (STUDY.evaluations("finalists").summary, "evaluations/finalists/evaluation_summary.json", "evaluator"),
    (STUDY.evaluations("base").checkpoint("base").metrics, "evaluations/base/base/metrics.json", "evaluator"),
    (TRIAL.params, "trial_0005/params.json", "optimizer"),
    (TRIAL.state, "trial_0005/trial_state.json", "optimizer"),
    (TRIAL.folder / "train_config.toml", "trial_0005/train_config.toml", "optimizer"),
    (TRIAL.command_files / "collect.json", "trial_0005/command/collect.json", "optimizer"),
    (TRIAL.output / "x.safetensors", "trial_0005/output/x.safetensors", "trainer"),
    (TRIAL.trainer_exit, "trial_0005/trainer_exit.json", "trainer"),
    (TRIAL.trainer_lock, "trial_0005/trainer.lock", "trainer"),
    (TRIAL.training_log, "trial_0005/training.log", "trainer"),
    (TRIAL.tensorboard / "events", "trial_0005/logs/events", "trainer"),
    (TRIAL.training_state / "optimizer.pt", "trial_0005/state/optimizer.pt", "trainer"),
    (TRIAL.folder / "sample/lora_trial_5_000002.png", "trial_0005/sample/lora_trial_5_000002.png", "trainer"),
    (TRIAL.kohya_training_state(2) / "optimizer.bin", "trial_0005/lora_trial_5-000002-state/optimizer.bin", "trainer"),
    (TRIAL.intermediate_checkpoint(2), "trial_0005/lora_trial_5-000002.safetensors", "trainer"),
    (TRIAL.final_checkpoint, "trial_0005/lora_trial_5.safetensors", "trainer"),
    (TRIAL.attempt(1) / "training.log", "trial_0005/attempts/01/training.log", "optimizer"),
    (TRIAL.evaluation_log, "trial_0005/realtime_evaluation.log", "evaluator"),
    (TRIAL.evaluations.lock, "trial_0005/realtime_evaluations/.lock", "evaluator"),
    (TRIAL.evaluations.state, "trial_0005/realtime_evaluations/evaluation_state.json", "evaluator"),
    (TRIAL.evaluations.summary, "trial_0005/realtime_evaluations/evaluation_summary.json", "evaluator"),
    (TRIAL.evaluations.checkpoint("x").metrics, "trial_0005/realtime_evaluations/x/metrics.json", "evaluator"),
    (TRIAL.evaluations.checkpoint("x").sample(7), "trial_0005/realtime_evaluations/x/sample_7.png", "evaluator"),
    (TRIAL.evaluations.checkpoint("x").grid, "trial_0005/realtime_evaluations/x/grid.png", "evaluator"),
    (TRIAL.final_evaluation.metrics, "trial_0005/evaluation/metrics.json", "optimizer"),
    (TRIAL.final_evaluation.text_summary, "trial_0005/evaluation/EVALUATION_SUMMARY.txt", "optimizer"),
    (TRIAL.final_evaluation.grid, "trial_0005/evaluation/grid.png", "optimizer"),
    (TRIAL.final_evaluation.sample(0), "trial_0005/evaluation/sample_0.png", "optimizer"),
    (STUDY.results.best_parameters, "results/best_parameters.json", "optimizer"),
    (STUDY.results.all_trials, "results/all_trials.json", "optimizer"),
    (STUDY.results.optimization_history, "results/optimization_history.png", "optimizer"),
    (STUDY.results.param_importances, "results/param_importances.png", "optimizer"),
    (STUDY.results.report, "results/report.html", "optimizer"),
    (STUDY.results.config_optimized, "results/config_optimized.py", "optimizer"),
    (STUDY.results.summary_statistics, "results/analysis/summary_statistics.json", "optimizer"),
    (STUDY.results.top_trials(10), "results/analysis/top_10_trials.csv", "optimizer"),
    (STUDY.results.score_evolution, "results/analysis/score_evolution.png", "optimizer"),
    (STUDY.results.metrics_comparison, "results/analysis/metrics_comparison.png", "optimizer"),
    (STUDY.results.parameter_correlation, "results/analysis/parameter_correlation.png", "optimizer"),
    (STUDY.results.epoch_vs_quality, "results/analysis/epoch_vs_quality.png", "optimizer"),
    (STUDY.results.trial_curves, "results/analysis/epoch_vs_quality_by_trial.png", "optimizer"),
    (STUDY.results.training_config_for("kohya"), "results/analysis/best_training_config_kohya.toml", "optimizer"),
    (STUDY.best_training / "lora_best_training.safetensors", "best_training/lora_best_training.safetensors", "trainer"),
    (STUDY.results.best_training_config_text, "results/analysis/best_training_config.txt", "optimizer"),
    (STUDY.results.best_training_config, "results/analysis/best_training_config.toml", "optimizer"),
    (STUDY.results.pareto_front, "results/analysis/pareto_front.json", "optimizer"),
    (STUDY.results.pareto_front_picture, "results/analysis/pareto_front.png", "optimizer"),
    (STUDY.results.optimization_report, "results/analysis/OPTIMIZATION_REPORT.md", "optimizer"),
]


def inside(path: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(STUDY.root))


@pytest.mark.parametrize(("path", "expected", "writer"), TREE, ids=[expected for _, expected, _ in TREE])
def test_a_path_lies_where_promised_and_has_its_writer(path, expected, writer):
    assert inside(path) == PurePosixPath(expected)
    assert writer_of(inside(path)) == writer


@pytest.mark.parametrize(
    "layout", [STUDY, TRIAL, TRIAL.evaluations, STUDY.evaluations("finalists"), TRIAL.final_evaluation, STUDY.results]
)
def test_no_path_of_a_layout_is_missing_above(layout):
    tested = {path for path, _, _ in TREE}
    tested |= {parent for path in tested for parent in path.parents}
    paths = {name: getattr(layout, name) for name in dir(layout) if not name.startswith("_")}
    assert {name for name, path in paths.items() if isinstance(path, Path) and path not in tested} == set()


def test_every_pattern_is_the_first_to_fit_some_path():
    first = [next(pattern for pattern in WRITERS if matches(pattern, inside(path))) for path, _, _ in TREE]
    assert set(first) == set(WRITERS)


@pytest.mark.parametrize("place", [place for document in DOCUMENTS for place in document.patterns])
def test_every_place_of_a_document_is_a_path_of_the_layout(place):
    assert any(matches(place, inside(path)) for path, _, _ in TREE)


@pytest.mark.parametrize("name", ["notes.txt", "trial_0005/notes.txt", "requests/stop.json", "run.json.bak", "results"])
def test_a_path_outside_the_contract_has_no_writer(name):
    with pytest.raises(KeyError):
        writer_of(PurePosixPath(name))


@pytest.mark.parametrize(
    "name",
    [
        "trial_0005/.trial_state.json.tmp-12-345-0123abcd",
        "trial_0005/trial_state.json.corrupt-20251115T120000+0000",
        "trial_0005/trial_state.json.corrupt-20251115T120000+0000-2",
        "optimization.log.3",
        "optuna_study.db-wal",
    ],
)
def test_what_belongs_to_a_file_has_the_writer_of_the_file(name):
    assert writer_of(PurePosixPath(name)) == "optimizer"


@pytest.mark.parametrize(
    ("optuna_number", "folder", "output_name"),
    [(0, "trial_0001", "lora_trial_1"), (4, "trial_0005", "lora_trial_5"), (9999, "trial_10000", "lora_trial_10000")],
)
def test_a_folder_is_numbered_one_above_optuna(optuna_number, folder, output_name):
    trial = STUDY.trial_of_optuna(optuna_number)
    assert (trial.name, trial.number, trial.output_name) == (folder, optuna_number + 1, output_name)


@pytest.mark.parametrize("number", [0, -1])
def test_trials_are_counted_from_one(number):
    with pytest.raises(ValueError, match=f"counted from 1 but got {number}"):
        STUDY.trial(number)


def test_a_folder_without_number_keeps_its_name():
    trial = TrialLayout(Path("study/trial_luca"))
    assert (trial.number, trial.output_name) == (None, "lora_trial_luca")


@pytest.mark.parametrize(
    ("name", "metadata", "max_epochs", "expected"),
    [
        pytest.param("lora_trial_5-000002.safetensors", None, 12, 2, id="the number after the last dash"),
        pytest.param("lora_trial_5-000002.safetensors", "7", 12, 2, id="the name goes before the metadata"),
        pytest.param("luca-v6-000004.safetensors", None, None, 4, id="only the last dash counts"),
        pytest.param("luca-v6.safetensors", "4", None, 4, id="the metadata where the name tells nothing"),
        pytest.param("luca.safetensors", 4, None, 4, id="metadata that is a number"),
        pytest.param("lora_trial_5.safetensors", None, 12, 12, id="the final file has the last epoch"),
        pytest.param("lora_trial_5.safetensors", "11", 12, 11, id="the metadata goes before the last epoch"),
        pytest.param("lora_trial_5.safetensors", "None", 12, 12, id="metadata without a number is none"),
        pytest.param("lora_trial_5.safetensors", None, None, None, id="the final file of unknown length"),
        pytest.param("luca.safetensors", None, 12, None, id="another name tells nothing"),
        pytest.param("luca-step00000500.safetensors", None, 12, None, id="a step is no epoch"),
        pytest.param("luca-٣.safetensors", None, 12, None, id="only ASCII digits are digits"),
    ],
)
def test_the_epoch_of_a_checkpoint(name, metadata, max_epochs, expected):
    assert checkpoint_epoch(name, metadata, max_epochs, "lora_trial_5") == expected


@pytest.mark.parametrize(
    ("epochs", "every", "expected"), [(8, 2, 4), (10, 2, 5), (12, 2, 6), (15, 2, 8), (20, 2, 10), (1, 5, 1), (7, 1, 7)]
)
def test_the_number_of_checkpoints_to_expect(epochs, every, expected):
    assert expected_checkpoints(epochs, every) == expected


@pytest.mark.parametrize(("epochs", "every"), [(0, 2), (8, 0), (-1, 1)])
def test_no_checkpoints_can_be_expected_of_nothing(epochs, every):
    with pytest.raises(ValueError, match=f"but got {epochs} and {every}"):
        expected_checkpoints(epochs, every)


def test_trials_are_listed_by_number(tmp_path):
    for name in ("trial_0010", "trial_0002", "trial_10000", "trial_luca", "trial_3", "results", "my_trial_1"):
        (tmp_path / name).mkdir()
    (tmp_path / "trial_0004").touch()  # a file, no trial
    trials = StudyLayout(tmp_path).list_trials()
    assert [trial.name for trial in trials] == ["trial_0002", "trial_3", "trial_0010", "trial_10000", "trial_luca"]


def test_weight_files_of_any_name_are_listed_and_temporary_ones_are_not(tmp_path):
    trial = TrialLayout(tmp_path / "trial_0005")
    (trial.folder / "attempts").mkdir(parents=True)
    for name in (
        "b.safetensors",
        "a-000002.safetensors",
        ".tmpX1.safetensors",
        ".tmpX2",
        "a.ckpt",
        "attempts/c.safetensors",
    ):
        (trial.folder / name).touch()
    assert [path.name for path in trial.list_checkpoints()] == ["a-000002.safetensors", "b.safetensors"]


def test_a_missing_folder_lists_nothing(tmp_path):
    study = StudyLayout(tmp_path / "gone")
    assert study.list_trials() == []
    assert study.trial(1).list_checkpoints() == []
    assert study.list_requests("optimizer") == []


def test_requests_are_listed_in_order_without_answers_and_unfinished_files(tmp_path):
    study = StudyLayout(tmp_path)
    folder = study.requests("optimizer")
    folder.mkdir(parents=True)
    late = study.request("optimizer", NOON + timedelta(seconds=1), "aaaa")
    early = study.request("optimizer", NOON.astimezone(timezone(timedelta(hours=8))), "bbbb")
    by_hand = folder / "stop.json"
    for path in (
        late,
        early,
        by_hand,
        study.answer(late),
        folder / ".stop.json.tmp-1-1-0123abcd",
        folder / "notes.txt",
    ):
        path.touch()
    assert study.list_requests("optimizer") == [early, late, by_hand]


def test_a_request_by_hand_is_answered_under_its_whole_name():
    assert STUDY.answer(Path("requests/optimizer/my-stop.json")).name == "my-stop.done.json"


@pytest.mark.parametrize("label", ["", "..", "../x", "a/b", "A", ".hidden", "x" * 65, "a\n"])
def test_a_label_cannot_leave_its_folder(label):
    with pytest.raises(ValueError, match="an evaluation label must match"):
        STUDY.evaluations(label)
