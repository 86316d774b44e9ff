"""The real command on a model of Stable Diffusion 1.5's true size: every module of a usual LoRA is applied."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from shared.files import read_model
from shared.layout import StudyLayout
from shared.schemas import Metrics
from tests.evaluator_daemon.sd15_size import SIZE_PX, save_sd15_size, sd15_modules
from tests.evaluator_daemon.tiny_models import PROMPTS
from tests.evaluator_daemon.written_run import write_run
from tests.scenarios import lora_files

LIMIT_S = 1500


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_a_rank_4_lora_of_192_and_72_modules_is_scored_on_a_cpu(tmp_path, record_property):
    base = save_sd15_size(tmp_path / "base")
    modules = sd15_modules()
    unet = [name for name in modules if name.startswith("lora_unet_")]
    assert (len(unet), len(modules) - len(unet)) == (192, 72)
    study = StudyLayout(tmp_path / "study")
    write_run(study, base, PROMPTS, samples=2, steps=2)
    trial = study.trial(1)
    trial.folder.mkdir()
    trial.final_checkpoint.write_bytes(lora_files.lora(3, modules, metadata=lora_files.STANDARD))
    half = dict(list(modules.items())[::2]) | {"lora_unet_not_of_this_model": (4, 4)}
    trial.intermediate_checkpoint(2).write_bytes(lora_files.lora(4, half))

    begin = time.monotonic()
    command = [sys.executable, "-m", "evaluator_daemon.cli", "evaluate", "--trial", str(trial.folder)]
    ended = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False, timeout=LIMIT_S)
    seconds = time.monotonic() - begin
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    assert ended.returncode == 0, ended.stderr
    metrics = read_model(trial.evaluations.checkpoint(trial.final_checkpoint.stem).metrics, Metrics)
    base_metrics = next(study.reference.glob("*/metrics.json"))
    assert metrics.metrics["base_difference"].value > 0, "the LoRA shows"
    assert all(metrics.metrics[name].status == "ok" for name in ("brightness", "contrast", "saturation", "sharpness"))
    for pictures in (base_metrics.parent, trial.evaluations.checkpoint(trial.final_checkpoint.stem).folder):
        assert np.asarray(Image.open(pictures / "sample_1.png")).shape == (SIZE_PX, SIZE_PX, 3)
    refused = trial.evaluation_log.read_text()
    assert "code=not_applied" in refused, "one unknown module and nothing is scored"
    figures = {"seconds": round(seconds, 1), "evaluation": metrics.seconds.model_dump(), "peak_mb": peak_mb}
    record_property("figures", str(figures))
    print(figures)
