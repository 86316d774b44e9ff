"""Where a setting comes from, and what is said when it will not do."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimizer_daemon.settings import OptimizerSettings
from shared.errors import SettingsError
from shared.settings import LoadedSettings, add_settings_flags, load_settings


def load(*flags: str, environment: dict[str, str] | None = None) -> LoadedSettings[OptimizerSettings]:
    parser = argparse.ArgumentParser()
    add_settings_flags(parser, OptimizerSettings)
    return load_settings(OptimizerSettings, parser.parse_args(flags), environment or {})


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text('[optimizer]\nn_trials = 7\nseed = 1\nbase_model = "models/base"\n\n[evaluator]\ndevice = "cpu"\n')
    return file


def test_a_flag_beats_the_environment_which_beats_the_study_file_which_beats_the_default(study_file: Path):
    loaded = load(
        "--config", str(study_file), "--n-trials", "9", environment={"OPTIMIZER_DAEMON_SEED": "2", "UNRELATED": "x"}
    )
    assert (loaded.settings.n_trials, loaded.origins["n_trials"]) == (9, "--n-trials")
    assert (loaded.settings.seed, loaded.origins["seed"]) == (2, "OPTIMIZER_DAEMON_SEED")
    assert loaded.origins["base_model"] == f"{study_file} [optimizer] base_model"
    assert (loaded.settings.num_samples, loaded.origins["num_samples"]) == (8, "default")


def test_a_relative_path_in_the_study_file_is_relative_to_that_file(study_file: Path):
    assert load("--config", str(study_file)).settings.base_model == study_file.parent / "models/base"


def test_a_relative_path_of_a_flag_is_relative_to_the_working_directory():
    assert load("--base-model", "models/base").settings.base_model == Path("models/base")


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        pytest.param(["--n-trials", "0"], {}, "--n-trials: '0' will not do; input should be greater than", id="range"),
        pytest.param(["--device", "gpu"], {}, "--device: 'gpu' will not do", id="pattern"),
        pytest.param([], {"OPTIMIZER_DAEMON_SEED": "x"}, "OPTIMIZER_DAEMON_SEED: 'x' will not do", id="variable"),
        pytest.param(
            [], {"OPTIMIZER_DAEMON_SEEED": "1"}, "OPTIMIZER_DAEMON_SEEED: '1' will not do; there is no such setting; "
            "did you mean seed?", id="unknown variable",
        ),
        pytest.param(["--config", "/nowhere.toml"], {}, "--config: '/nowhere.toml' will not do; name a", id="no file"),
    ],
)  # fmt: skip
def test_an_unusable_value_is_named_with_its_source_and_remedy(flags, environment, expected):
    with pytest.raises(SettingsError) as caught:
        load(*flags, environment=environment)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[optimizer]\nn_trails = 3\n", "run.toml line 2: n_trails: 3 will not do; there is no such setting; "
         "did you mean n_trials?"),
        ("n_trials = 3\n", "run.toml line 1: n_trials: 3 will not do; settings belong into one of the tables"),
        ("[optimiser]\nn_trials = 3\n", "run.toml line 1: optimiser: {'n_trials': 3} will not do"),
        ("[optimizer]\nn_trials = \n", "mend the TOML (Invalid value (at line 2"),
        ('[optimizer]\nn_trials = "many"\n', "run.toml [optimizer] n_trials: 'many' will not do"),
        ("[optimizer]\nn_trials = true\n", "run.toml [optimizer] n_trials: True will not do"),
    ],
    ids=["unknown field", "no table", "unknown table", "broken TOML", "wrong type", "a boolean is no number"],
)  # fmt: skip
def test_a_mistake_in_the_study_file_is_named_with_file_and_line_or_field(tmp_path, text, expected):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load("--config", str(file))
    assert expected in str(caught.value)


@pytest.mark.parametrize("module", ["optimizer_daemon.cli", "evaluator_daemon.cli"])
def test_the_settings_verb_shows_origins_and_fails_with_one_line_and_code_2(module, study_file: Path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, "settings", "--config", str(study_file), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))

    rows = json.loads(run("--json").stdout)
    assert any(str(study_file) in row["origin"] for row in rows)
    assert all(row["description"] for row in rows)
    failed = run("--num-samples", "0")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "--num-samples" in failed.stderr
    assert "8" not in failed.stdout
