"""Every file of results/: there, whole, and with the figures of the study's database."""

from __future__ import annotations

import tomllib
from pathlib import Path

import optuna
import pytest
from PIL import Image

from optimizer_daemon.analysis.analyze import analysis_of, analyze, pictures, write_documents
from optimizer_daemon.commands import ask
from optimizer_daemon.lora_training.config import load_config
from shared.errors import UserError
from shared.files import read_model
from shared.layout import StudyLayout, writer_of
from shared.schemas import AllTrials, Analyze, ParetoFront, SummaryStatistics, TrialState
from tests.scenarios.agreeing_results import require_agreement, rows, table
from tests.scenarios.measured_study import Written, write_study

TWELVE = Written(
    trials=12, step=0.004, noise=0.002, states={4: "failed", 7: "pruned", 11: "training"}, black=(3,),
    baselines={"v6": 0.05},
)  # fmt: skip
COMPLETE = [1, 2, 5, 6, 8, 9, 10, 12, 3]  # 3 is black


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> StudyLayout:
    study = write_study(tmp_path_factory.mktemp("analysis") / "study", TWELVE)
    analyze(study, 4)
    return study


@pytest.fixture(scope="module")
def stored(study) -> dict[int, optuna.trial.FrozenTrial]:
    """The trials of the database by the number people see."""
    found = optuna.load_study(study_name="written", storage=f"sqlite:///{study.database}")
    return {trial.number + 1: trial for trial in found.get_trials(deepcopy=False)}


def statistics(study: StudyLayout) -> SummaryStatistics:
    return read_model(study.results.summary_statistics, SummaryStatistics)


def state_of(study: StudyLayout, trial: int) -> TrialState:
    return read_model(study.trial(trial).state, TrialState)


def report(study: StudyLayout) -> str:
    return study.results.optimization_report.read_text()


def told(study: StudyLayout) -> StudyLayout:
    """Have everything written and each picture made, but not drawn to its file, which takes a second."""
    analysis = analysis_of(study)
    write_documents(study, analysis)
    for draw in pictures(study, analysis).values():
        assert draw().axes
    return study


def test_every_file_of_the_contract_is_there_and_each_picture_shows_something(study):
    results = study.results
    layout = type(results)
    names = [name for name in dir(layout) if not name.startswith("_") and isinstance(getattr(results, name), Path)]
    # Pages and workloads of their own, and what only several objectives have.
    later = {"folder", "analysis", "report", "config_optimized", "pareto_front", "pareto_front_picture"}
    for name in sorted(set(names) - later):
        path = getattr(results, name)
        assert path.is_file(), name
        assert writer_of(path.relative_to(study.root)) == "optimizer"
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 200
                assert picture.convert("L").getextrema() == (0, 255) or len(picture.getcolors(2**24)) > 50
    assert results.top_trials(10).is_file() and results.top_trials(4).is_file()
    assert not list(results.folder.rglob(".*")), "something half written was left"


def test_the_table_has_the_databases_values_and_parameters_the_best_first(study, stored):
    found = rows(study)
    assert [int(row["trial"]) for row in found] == COMPLETE
    for row in found:
        trial = stored[int(row["trial"])]
        assert int(row["optuna_number"]) == trial.number
        assert float(row["value"]) == trial.value == float(row["combined_score"])
        for name, value in trial.params.items():
            assert row[name] == str(value)
    assert [row["feasible"] for row in found] == ["True"] * 8 + ["False"]
    values = [float(row["value"]) for row in found[:-1]]
    assert values == sorted(values)
    assert [int(row["trial"]) for row in rows(study, 4)] == COMPLETE[:4]


def test_table_statistics_and_report_say_what_the_database_says(study):
    require_agreement(study)
    found = statistics(study)
    assert found.trials["training"] == 1
    assert found.winner.tie_set[0] == 1 and 0 < found.winner.certainty <= 1
    assert {failure.trial for failure in found.failures} == {4}
    assert found.problems == ()


def test_the_report_has_the_same_figures_as_table_and_statistics(study):
    text, found, listed = report(study), statistics(study), rows(study, 4)
    winner = found.winner
    assert f"Trial {winner.trial} is the best of 8 complete trials" in text
    assert f"combined_score {winner.value:.4f} (lower is better)" in text
    assert f"with a chance of {winner.certainty:.0%}" in text
    shown = table(text, "The best")
    assert [(row[0], row[1]) for row in shown[:4]] == [(r["trial"], f"{float(r['value']):.4f}") for r in listed]
    for cells, row in zip(shown, listed, strict=False):
        brightness = f"{float(row['brightness']):.3f} ± {float(row['brightness_std']):.3f}"
        assert brightness in cells
        assert (row["in_tie_set"] == "True") == (cells[2] == "yes") == (int(row["trial"]) in winner.tie_set)
    for name, rate in found.rates.items():
        (cells,) = [cells for cells in table(text, "The four rates") if cells[0] == name]
        assert cells[1] == f"{rate.share:.0%} ({rate.count} of {rate.of})"
        assert cells[2:4] == [rate.before, rate.hoped]
    for figure, goal in found.goals["winner"].items():
        (cells,) = [cells for cells in table(text, "Goals") if cells[0] == figure]
        assert (
            cells[2] == f"{goal.value:.4f}, {'reached' if goal.missed_by == 0 else f'missed by {goal.missed_by:.4f}'}"
        )
    base = found.against["base model"]["combined_score"]
    assert f"a difference of {base.difference:+.4f} (95 % interval {base.low:+.4f} to {base.high:+.4f})" in text
    importance = found.importances["learning_rate"]
    (cells,) = [cells for cells in table(text, "What the parameters do") if cells[0] == "learning_rate"]
    assert cells[1] == f"{importance.share:.2f} ({importance.low:.2f} to {importance.high:.2f})"
    assert "trial 4 failed: the failed trial's reason" in text
    assert "trial 3 cannot win" in text


def test_what_decides_is_important_and_correlated(study):
    found = statistics(study)
    assert sum(one.share for one in found.importances.values()) == pytest.approx(1)
    assert all(one.low <= one.share <= one.high for one in found.importances.values())
    (rate,) = [c for c in found.correlations if (c.parameter, c.figure) == ("learning_rate", "combined_score")]
    assert rate.rho > 0.95 and rate.low > 0.8
    assert rate.trials == 8
    assert not any(c.parameter == "max_train_epochs" for c in found.correlations), "it never changes"


def test_the_best_configuration_is_the_winners_for_both_trainers(study):
    config = load_config(study.results.best_training_config)
    written = {trial.trial: trial for trial in read_model(study.results.all_trials, AllTrials).trials}[1].parameters
    for name in ("learning_rate", "network_dim", "network_alpha", "optimizer_type", "max_train_epochs"):
        assert getattr(config, name) == written[name]
    assert config.text_encoder_rates == [written["text_encoder_lr"]]
    assert (config.seed, config.output_dir) == (1, study.root / "best_training")
    kohya = tomllib.loads(study.results.training_config_for("kohya").read_text())
    assert (
        written.items() - {("text_encoder_lr", written["text_encoder_lr"])}
        <= {name: value for name, value in kohya.items() if isinstance(value, str | int | float)}.items()
    )
    assert kohya["text_encoder_lr"] == [written["text_encoder_lr"]]
    assert (kohya["network_module"], kohya["dataset_config"]) == ("networks.lora", "/data/dataset.toml")
    text = study.results.best_training_config_text.read_text()
    assert "optimizer_daemon.lora_training --config" in text and str(study.results.best_training_config) in text
    parameters = tomllib.loads(text)
    assert parameters.pop("seed") == 1
    assert parameters == written
    assert f"combined_score         {rows(study)[0]['combined_score'][:6]}" in text


@pytest.mark.parametrize(
    ("written", "says"),
    [
        pytest.param(Written(trials=0), "There is no winner yet: none of 0 trials has a score.", id="no trial"),
        pytest.param(
            Written(trials=2, states={1: "failed", 2: "training"}),
            "none of 2 trials has a score, 1 of them failed", id="none complete",
        ),
        pytest.param(Written(trials=1), "It is the only one so far, so there is nothing to compare", id="one complete"),
        pytest.param(Written(trials=1, black=(1,)), "1 of 1 trials have a score, and none passed its gate", id="black"),
        pytest.param(Written(trials=2, pictures=1), "How sure that is cannot be told: too few", id="1 picture"),
        pytest.param(Written(trials=2, base_shift=None), "The base model has not been rendered", id="no base"),
        pytest.param(
            Written(trials=2, shift={(1, 4): -0.0085}),
            "Trial 1 was better before its end: trial_0001/lora_trial_1-000004.safetensors of epoch 4", id="overtaken",
        ),
    ],
)  # fmt: skip
def test_a_study_with_little_in_it_is_told_as_it_is(tmp_path, written, says):
    study = write_study(tmp_path / "study", written)
    told(study)
    assert says in report(study)
    found = statistics(study)
    assert (found.winner is None) == ("no winner" in says or "none" in says)
    assert study.results.best_training_config.exists() == (found.winner is not None)
    assert says.split(":")[0] in study.results.best_training_config_text.read_text()


def test_with_finalists_the_winner_and_its_certainty_are_among_them(tmp_path):
    written = Written(trials=4, finalists={3: 1, 4: 2}, shift={(3, 6): 0.001})
    study = told(write_study(tmp_path / "study", written, storage=False))
    found = statistics(study)
    assert (found.winner.trial, found.winner.compared, found.winner.tie_set) == (3, 2, (3,))
    first = state_of(study, 1).value
    assert f"It trained the configuration of trial 1 again with a fresh seed, which scored {first:.4f}" in report(study)
    assert [int(row["trial"]) for row in rows(study)] == [1, 2, 3, 4], "the table ranks every trial"


def test_with_several_objectives_the_winner_is_the_knee_and_the_front_is_written(tmp_path):
    study = told(write_study(tmp_path / "study", Written(trials=5, objectives=True, noise=0.01), storage=False))
    front = read_model(study.results.pareto_front, ParetoFront)
    found = statistics(study)
    assert found.winner.trial == front.knee and found.winner.certainty is None
    said = f"Trial {front.knee} is the knee of the front of {len(front.front)} trade-offs: brightness_score"
    assert said in report(study)
    assert "pareto_front.png" in report(study)


def test_a_winner_that_is_gone_takes_its_configuration_along(tmp_path):
    study = write_study(tmp_path / "study", Written(trials=1))
    told(study)
    assert study.results.best_training_config.exists()
    study.trial(1).state.unlink()
    told(study)
    assert not study.results.best_training_config.exists()
    assert not study.results.training_config_for("kohya").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", b"{}"),
        ("optuna_study.db", None),
        ("optuna_study.db", b"no database at all" * 100),
        ("trial_0001/params.json", None),
        ("trial_0002/realtime_evaluations/lora_trial_2/metrics.json", b"\x00"),
        ("results/all_trials.json", b""),
    ],
)
def test_a_half_broken_study_is_told_with_what_is_broken(tmp_path, file, content):
    study = write_study(tmp_path / "study", Written(trials=3))
    path = study.root / file
    path.unlink() if content is None else path.write_bytes(content)
    told(study)
    text = report(study)
    assert ("## Missing and damaged files" in text and str(path) in text) == (file != "results/all_trials.json")
    assert "is the best of" in text
    assert path.exists() == (content is not None), "whoever reads makes nothing"
    assert statistics(study).winner.trial == (2 if "0001" in file else 1)


def test_without_a_daemon_the_verb_writes_and_mends_the_results_itself(tmp_path):
    study = write_study(tmp_path / "study", Written(trials=2))
    study.results.all_trials.unlink()
    said = ask(study, Analyze(kind="analyze", top_n=3))
    assert said == f"written: {study.results.folder}"
    assert study.results.top_trials(3).exists()
    assert [trial.trial for trial in read_model(study.results.all_trials, AllTrials).trials] == [1, 2]


def test_a_damaged_trial_is_not_taken_out_of_whole_results(tmp_path):
    study = write_study(tmp_path / "study", Written(trials=2))
    study.trial(2).params.write_bytes(b"{")
    ask(study, Analyze(kind="analyze"))
    assert [trial.trial for trial in read_model(study.results.all_trials, AllTrials).trials] == [1, 2]


def test_an_empty_folder_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        ask(StudyLayout(tmp_path), Analyze(kind="analyze"))
    assert list(tmp_path.iterdir()) == []
