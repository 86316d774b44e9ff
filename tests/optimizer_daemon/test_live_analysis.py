"""The results of a living study: written beside the run, asked for while it trains, and by a person from the shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.files import read_model
from shared.layout import StudyLayout
from shared.schemas import AllTrials, SummaryStatistics
from tests.scenarios.measured_study import Written, write_study
from tests.scenarios.quick_lab import PATIENCE_S, QuickLab


def verb(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimizer_daemon.cli", "analyze", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def test_a_study_writes_its_results_beside_the_run_and_again_when_asked_while_it_trains(tmp_path):
    with QuickLab(tmp_path) as lab:
        gate = tmp_path / "go on"
        daemon = lab.optimizer("--n-trials", 2, hold=str(gate))
        lab.wait_for_training(1, daemon)
        said = lab.ask("analyze", "--top-n", 3)
        assert said.returncode == 0, said.stderr
        assert "There is no winner yet: none of 1 trials has a score." in said.stdout
        table = lab.study.results.top_trials(3)
        assert table.read_text().count("\n") == 1
        gate.write_text("")
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
        statistics = read_model(lab.study.results.summary_statistics, SummaryStatistics)
        trials = read_model(lab.study.results.all_trials, AllTrials).trials
        assert statistics.trials == {"complete": 2}
        assert statistics.winner.value == min(trial.value for trial in trials)
        assert table.read_text().count("\n") == 3, "a table that somebody asked for is kept current"
        assert statistics.problems == ()
        assert "results not written" not in lab.log()


def test_the_seeds_command_prints_the_headline_and_where_everything_lies(tmp_path):
    study = write_study(tmp_path / "study", Written(trials=3))
    said = verb("--results-dir", study.root, "--top-n", "2")
    assert said.returncode == 0, said.stderr
    assert "Trial 1 is the best of 3 complete trials" in said.stdout
    assert str(study.results.folder) in said.stdout
    assert study.results.top_trials(2).read_text().count("\n") == 3
    as_json = verb("--results-dir", study.root, "--json")
    assert json.loads(as_json.stdout)["winner"]["trial"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--top-n", "0"], "--top-n"),
        (["--results-dir", "nowhere"], "nowhere"),
        ([], "--output-dir"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, words, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = verb(*words)
    assert found.returncode == 2
    assert says in found.stderr and "Traceback" not in found.stderr and found.stderr.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_results_folder_that_cannot_be_written_is_named(tmp_path):
    study: StudyLayout = write_study(tmp_path / "study", Written(trials=1))
    Path(study.results.analysis).write_text("in the way")
    found = verb("--results-dir", study.root)
    assert found.returncode == 4
    assert str(study.results.analysis) in found.stderr and "Traceback" not in found.stderr
