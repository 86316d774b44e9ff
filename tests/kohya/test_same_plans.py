"""One trial's parameters, planned by both trainers and trained as planned: the checkpoints tell the same of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import Prepares
from shared.files import read_model
from shared.layout import StudyLayout
from shared.schemas import Run, Trainer, TrialParams
from tests.kohya.make_golden import GOLDEN
from tests.kohya.narrow_world import NarrowWorld
from tests.kohya.native_twin import OF_ITS_RUN
from tests.optimizer_daemon.lora_training.workshop import header_of

pytestmark = pytest.mark.slow

FORMATS = GOLDEN.parent / "formats/v1"
# Those of both presets, each with another course of the rates.
OPTIMIZERS = {"AdamW": "cosine", "AdamW8bit": "cosine_with_restarts", "Lion": "polynomial", "Adafactor": "cosine"}
# The kohya trainer checkpoints gradients, as its users do.
OF_THE_TRAINER = {"ss_gradient_checkpointing"}
# Lion is of another library: lion_pytorch theirs, bitsandbytes ours.
OF_THE_LIBRARY = {"Lion": {"ss_optimizer"}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trial_of_the_presets_is_trained_alike(world: NarrowWorld, tmp_path: Path, optimizer: str):
    parameters = {
        "learning_rate": 1e-4,
        "text_encoder_lr": 5e-5,
        "network_dim": 4,
        "network_alpha": 2,
        "optimizer_type": optimizer,
        "lr_scheduler": OPTIMIZERS[optimizer],
        "gradient_accumulation_steps": 1,
        "max_train_epochs": 2,
        "lr_warmup_steps": 1,
    }
    kohya = Trainer(name="kohya", python=world.python, directory=str(world.checkout), family="sd15")
    theirs = trained(world, tmp_path / "theirs", kohya, parameters)
    ours = trained(world, tmp_path / "ours", Trainer(name="native", python=sys.executable), parameters)
    assert [header_of(path)[0].keys() for path in theirs] == [header_of(path)[0].keys() for path in ours]
    for path, other in zip(theirs, ours, strict=True):
        metadata, golden = header_of(other)[1], header_of(path)[1]
        assert golden.keys() - metadata.keys() == {"ss_sd_scripts_commit_hash"}
        differing = {key for key in metadata if number(metadata[key]) != number(golden[key])}
        differing -= OF_ITS_RUN | OF_THE_TRAINER | OF_THE_LIBRARY.get(optimizer, set())
        assert {key: (metadata[key], golden[key]) for key in differing} == {}


def number(text: str) -> float | str:
    """Return what may be written 2 or 2.0 as a number; sd-scripts repeat it as their file has it."""
    try:
        return float(text)
    except ValueError:
        return text


def trained(world: NarrowWorld, root: Path, trainer: Trainer, parameters: dict[str, Any]) -> list[Path]:
    """Train as the plan says; return the checkpoints."""
    study = StudyLayout(root)
    trial = study.trial(1)
    trial.folder.mkdir(parents=True)
    golden = read_model(FORMATS / "run.json", Run)
    settings = {"dataset-config": str(world.dataset), "save-every-n-epochs": 1, "device": "cpu", "seed": 42}
    changes = {"base_model": world.base, "trainer": trainer, "settings": settings, "pictures": None}
    run = golden.model_copy(update=changes)
    params = read_model(FORMATS / "params.json", TrialParams).model_copy(
        update={"trial": 1, "optuna_number": 0, "parameters": parameters, "derived": ()}
    )
    plugin = TRAINERS.load(trainer.name)
    if isinstance(plugin, Prepares):
        plugin.prepare(run, study)
    plan = plugin.plan(params, trial, run)
    for name, text in plan.files.items():
        (trial.folder / name).write_text(text, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(plan.env)
    done = subprocess.run(plan.argv, cwd=plan.cwd, env=env, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found = sorted(trial.list_checkpoints())
    assert [path.name for path in found] == ["lora_trial_1-000001.safetensors", "lora_trial_1.safetensors"]
    return found
