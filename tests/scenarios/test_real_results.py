"""Twelve real trials of the tiny world: every file of results/, and all of them say what the database says."""

from __future__ import annotations

import pytest

from shared.files import read_model
from shared.schemas import Metrics, SummaryStatistics
from tests.scenarios.agreeing_results import require_agreement, rows
from tests.scenarios.lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TRIALS = 12


def test_the_results_of_a_real_study_agree_with_its_database_and_its_measurements(tmp_path):
    with Lab(tmp_path) as lab:
        daemon = lab.optimizer("--n-trials", TRIALS, "--pruner", "none")
        assert daemon.wait(3000) == 0, daemon.said
        study = lab.study
        require_agreement(study)
        for row in rows(study):
            trial = study.trial(int(row["trial"]))
            metrics = read_model(trial.final_evaluation.metrics, Metrics)
            assert float(row["value"]) == metrics.scores["combined_score"].value
            for name in ("brightness", "contrast", "saturation"):
                assert float(row[name]) == metrics.metrics[name].value
                assert float(row[f"{name}_std"]) == metrics.metrics[name].std
        statistics = read_model(study.results.summary_statistics, SummaryStatistics)
        assert statistics.problems == () and set(statistics.against) == {"base model"}
        analysis = {path.name for path in study.results.analysis.iterdir()}
        assert analysis >= {
            "summary_statistics.json", "top_10_trials.csv", "score_evolution.png", "metrics_comparison.png",
            "parameter_correlation.png", "epoch_vs_quality.png", "best_training_config.txt",
            "best_training_config.toml", "OPTIMIZATION_REPORT.md",
        }  # fmt: skip
