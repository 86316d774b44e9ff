"""SDXL through the real command: LoRAs of any trainer, scored by the evaluator alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shared.files import read_model
from shared.layout import StudyLayout
from shared.schemas import EvaluationState, Metrics
from tests.evaluator_daemon.lora_forms import KOHYA_XL, is_usual, kohya, random_pairs
from tests.evaluator_daemon.tiny_models import PROMPTS


def loras(folder) -> dict[str, bytes]:
    """A LoRA of every usual module of the tiny SDXL, and one for Stable Diffusion 1.x."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    models = {name: getattr(pipeline, name) for name in KOHYA_XL}
    pairs = [pair for name, model in models.items() for pair in random_pairs(name, model, is_usual)]
    return {"good": kohya(pairs, KOHYA_XL), "of_sd": kohya(pairs)}


@pytest.mark.slow
def test_an_sdxl_lora_is_scored_and_one_for_stable_diffusion_1_is_not_applied(sdxl_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    study = StudyLayout(tmp_path / "study")
    trial = study.trial(1)
    trial.folder.mkdir(parents=True)
    for name, content in loras(sdxl_model).items():
        (trial.folder / f"{name}.safetensors").write_bytes(content)
    command = [sys.executable, "-m", "evaluator_daemon.cli", "run", "--once", "--optimization-dir", study.root]
    command += ["--base-model", sdxl_model, "--prompts", tmp_path / "prompts.txt", "--device", "cpu"]
    command += ["--num-samples", "2", "--lora-scale", "0.8"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stderr
    records = read_model(trial.evaluations.state, EvaluationState).checkpoints
    verdicts = {record.checkpoint: (record.status, record.quarantine and record.quarantine.code) for record in records}
    assert verdicts == {"good": ("recorded", None), "of_sd": ("quarantined", "not_applied")}
    metrics = read_model(trial.evaluations.checkpoint("good").metrics, Metrics)
    assert metrics.metrics["base_difference"].value > 0.01, "the LoRA shows"
