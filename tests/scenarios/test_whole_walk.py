"""Both daemons on the tiny world, as a user runs them: what they leave behind, and what a second run adds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors import safe_open

from examples.tiny_world.paths import HERE
from examples.tiny_world.reference_lora import load_base
from shared.files import read_model
from shared.layout import StudyLayout, writer_of
from shared.schemas import EvaluationState

STUDY_FILE = HERE / "study.toml"
FINAL_NAMES = ["metrics.json", "grid.png", *[f"sample_{i}.png" for i in range(8)]]


def daemon(module: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, "run", "--config", str(STUDY_FILE), *map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run_both(root: Path, trials: int) -> tuple[str, str]:
    """Run both daemons until the study is finished; return what each printed."""
    evaluator = daemon("evaluator_daemon.cli", "--optimization-dir", root, "--exit-when-finished")
    optimizer = daemon("optimizer_daemon.cli", "--output-dir", root, "--n-trials", trials, "--max-epochs", 2,
                       "--save-every-n-epochs", 1)  # fmt: skip
    try:
        said = optimizer.communicate(timeout=280)[0], evaluator.communicate(timeout=120)[0]
    finally:
        for process in (optimizer, evaluator):
            process.kill()
    assert (optimizer.returncode, evaluator.returncode) == (0, 0), said
    return said


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[StudyLayout, str, str]:
    root = tmp_path_factory.mktemp("walk") / "study"
    optimizer, evaluator = run_both(root, 1)
    return StudyLayout(root), optimizer, evaluator


@pytest.mark.timeout(480)
def test_the_folder_holds_what_the_contract_lists_and_nothing_else(finished):
    study, said, _ = finished
    files = {PurePosixPath(f.relative_to(study.root).as_posix()) for f in study.root.rglob("*") if f.is_file()}
    names = ["run.json", "optimization.log", "evaluator_manager.log", "evaluator_manager_state.json",
             "watch_realtime_evaluation.sh", "optuna_study.db"]  # fmt: skip
    trial = ["params.json", "trial_state.json", "trainer_exit.json", "training.log", "realtime_evaluation.log",
             "lora_trial_1-000001.safetensors", "lora_trial_1.safetensors",
             "realtime_evaluations/evaluation_state.json", "realtime_evaluations/evaluation_summary.json",
             "evaluation/EVALUATION_SUMMARY.txt"]  # fmt: skip
    for checkpoint in ("lora_trial_1-000001", "lora_trial_1"):
        trial += [f"realtime_evaluations/{checkpoint}/{name}" for name in FINAL_NAMES]
    trial += [f"evaluation/{name}" for name in FINAL_NAMES]
    results = ["best_parameters.json", "all_trials.json", "optimization_history.png", "param_importances.png"]
    wanted = {*names, *(f"trial_0001/{n}" for n in trial), *(f"results/{n}" for n in results)}
    assert wanted <= {str(file) for file in files}
    for file in files:
        assert writer_of(file), file  # a file the contract does not know raises
    assert "Winner: trial 1" in said


@pytest.mark.timeout(480)
def test_the_lora_loads_in_diffusers_with_every_module_applied(finished):
    study, _, _ = finished
    file = study.trial(1).final_checkpoint
    with safe_open(file, "pt") as opened:
        keys, metadata = list(opened.keys()), opened.metadata()
    modules = {key.split(".")[0] for key in keys}
    pipeline = load_base()
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    applied = [name for model in (pipeline.unet, pipeline.text_encoder) for name, _ in model.named_modules()
               if name.endswith("lora_A")]  # fmt: skip
    assert len(applied) == len(modules)
    assert all(module.startswith(("lora_unet_", "lora_te_text_model_encoder_layers_")) for module in modules)
    params = json.loads(study.trial(1).params.read_text())["parameters"]
    assert metadata["ss_epoch"] == "2"
    assert int(metadata["ss_network_dim"]) == params["network_dim"]


@pytest.mark.timeout(480)
def test_the_same_command_again_adds_the_next_trial_and_evaluates_nothing_twice(finished):
    study, _, _ = finished
    before = {f: f.stat().st_mtime_ns for f in study.trial(1).evaluations.folder.rglob("*.png")}
    run_both(study.root, 2)
    assert {f: f.stat().st_mtime_ns for f in study.trial(1).evaluations.folder.rglob("*.png")} == before
    assert [trial.name for trial in study.list_trials()] == ["trial_0001", "trial_0002"]
    for trial in study.list_trials():
        records = read_model(trial.evaluations.state, EvaluationState).checkpoints
        assert [[attempt.outcome for attempt in record.attempts] for record in records] == [["recorded"]] * 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
