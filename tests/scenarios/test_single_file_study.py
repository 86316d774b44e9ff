"""A study whose base model is one file, through both daemons."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from examples.tiny_world.paths import BASE_MODEL
from shared.files import read_model
from shared.model_folders import digest_model
from shared.safetensors_file import read_header
from shared.schemas import EvaluationState, Run
from tests.scenarios.lab import Lab
from tests.shared.single_files import save_single_file


def as_single_file(folder: Path) -> Path:
    """The tiny world's base model as a file, its own tokenizer and settings beside it."""
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline.from_pretrained(BASE_MODEL, local_files_only=True, **parts)
    shutil.copytree(BASE_MODEL, folder / "tiny.config", ignore=shutil.ignore_patterns("*.safetensors"))
    return save_single_file(pipeline, folder / "tiny.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_is_trained_on_and_scored_and_known_by_its_content(tmp_path):
    file = as_single_file(tmp_path)
    with Lab(tmp_path, optimizer="n_trials = 1", base_model=file) as lab:
        manager, optimizer = lab.manager("--exit-when-finished"), lab.optimizer()
        assert optimizer.wait() == 0, optimizer.said
        assert manager.wait() == 0, manager.said
    (trial,) = lab.study.list_trials()
    state = read_model(trial.evaluations.state, EvaluationState)
    assert len(state.checkpoints) >= 2
    assert {record.status for record in state.checkpoints} == {"recorded"}
    plan = read_model(lab.study.run, Run).plan
    assert plan is not None
    assert plan.base_digest == digest_model(file)
    lora = trial.folder / "lora_trial_1.safetensors"
    metadata = read_header(lora, trial.folder).metadata
    assert metadata["ss_sd_model_name"] == "tiny.safetensors"
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(file.read_bytes()).hexdigest()
