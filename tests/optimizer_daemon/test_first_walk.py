"""One trial with everything real: the native trainer, the evaluator's own command, a random tiny pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.files import read_model
from shared.layout import StudyLayout
from shared.safetensors_file import lora_modules, read_checkpoint
from shared.schemas import AllTrials, Metrics, TrialState

SPACE = """
name = "one"
[parameters.learning_rate]
type = "float"
low = 1e-4
high = 1e-3
log = true
[parameters.network_dim]
type = "categorical"
choices = [4]
[parameters.network_alpha_ratio]
type = "float"
low = 0.5
high = 0.75
step = 0.25
[parameters.max_train_epochs]
type = "categorical"
choices = [3]
[derived]
network_alpha = "int(network_dim * network_alpha_ratio)"
"""
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_one_trial_from_the_draw_to_the_winner(tmp_path):
    from PIL import Image

    from tests.evaluator_daemon.tiny_models import save_base_model

    base = save_base_model(tmp_path / "base")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, colour in {"red": (200, 60, 60), "blue": (60, 60, 200)}.items():
        Image.new("RGB", (16, 16), colour).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a {name} ball\n")
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 16\nbatch_size = 1\n'
        '[[datasets.subsets]]\nimage_dir = "pictures"\n'
    )
    (tmp_path / "space.toml").write_text(SPACE)
    study = StudyLayout(tmp_path / "study")
    settings = {
        "base-model": base, "dataset-config": dataset, "output-dir": study.root, "device": "cpu", "n-trials": 1,
        "search-space": tmp_path / "space.toml", "num-samples": 2, "render-steps": 2, "trainer": "native",
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, "-m", "optimizer_daemon.cli", "run", *flags],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    log = study.trial(1).training_log
    assert result.returncode == 0, result.stderr + (log.read_text() if log.exists() else "")
    (trial,) = read_model(study.results.all_trials, AllTrials).trials
    assert trial.state == "complete"
    assert [point.epoch for point in trial.curve] == [2, 3]
    state = read_model(study.trial(1).state, TrialState)
    metrics = read_model(study.trial(1).final_evaluation.metrics, Metrics)
    assert metrics.scores["combined_score"].value == state.value
    final = read_checkpoint(study.trial(1).final_checkpoint, study.root)
    assert lora_modules(final).ranks == {4}
    assert metrics.checkpoint_sha256 == final.sha256
    assert study.results.optimization_history.stat().st_size > 5000
