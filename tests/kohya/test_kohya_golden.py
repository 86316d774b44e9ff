"""What the real sd-scripts wrote (tests/data/kohya), read by the kohya trainer; needs no sd-scripts."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimizer_daemon.lora_training.metadata import SETTINGS
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import ResumePoint
from optimizer_daemon.training_log import TrainingLog
from shared.files import read_model
from shared.layout import StudyLayout, TrialLayout
from shared.progress_bar import Progress
from shared.schemas import Run, Trainer, TrialParams
from tests.kohya.make_golden import GOLDEN
from tests.kohya.narrow_model import save_narrow_model
from tests.kohya.narrow_world import training_settings, write_pictures
from tests.kohya.native_twin import OF_ITS_RUN, train_native
from tests.optimizer_daemon.lora_training.workshop import header_of

LOGS = ("training", "resumed", "no_number")
FORMATS = GOLDEN.parent / "formats/v1"
KOHYA = TRAINERS.load("kohya")


def heard(name: str) -> list[Progress]:
    """Everything that the trainer understands of a log, line by line as the daemon reads it."""
    lines = [*TrainingLog(GOLDEN / f"{name}.log").new_lines()]
    assert len(lines) > 10
    return [progress for line in lines if (progress := KOHYA.parse_progress(line)) is not None]


@pytest.mark.parametrize(
    ("name", "epochs"), [("training", [1, 2, 3, 4]), ("resumed", [3, 4]), ("no_number", [1, 2, 3, 4])]
)
def test_the_epochs_that_stdout_announces(name: str, epochs: list[int]):
    assert [progress.epoch for progress in heard(f"{name}.stdout")] == epochs


@pytest.mark.parametrize(
    ("name", "steps", "last"), [("training", 4, 4), ("resumed", 4, 2), ("no_number", 8, 8)], ids=LOGS
)
def test_the_bar_of_steps_is_followed_and_no_other_counts_as_steps(name: str, steps: int, last: int):
    """Bars of validation and of samples are drawn between; a resumed training counts its own steps only."""
    bars = [bar for bar in heard(f"{name}.stderr") if bar.preparing is None]
    assert {bar.steps for bar in bars} == {steps}
    assert [bar.step for bar in bars] == sorted(bar.step for bar in bars)
    assert {bar.step for bar in bars} == set(range(last + 1))
    assert all(bar.epoch is None for bar in bars)


@pytest.mark.parametrize("name", LOGS)
def test_every_loss_that_is_written_behind_the_bar_is_read(name: str):
    text = (GOLDEN / f"{name}.stderr.log").read_text(encoding="utf-8")
    written = [float(loss) for loss in re.findall(r"avr_loss=([^],]+)", text)]
    read = [bar.loss for bar in heard(f"{name}.stderr") if bar.loss is not None]
    assert len(written) > 3
    assert list(map(repr, read)) == list(map(repr, written))  # repr, for nan is not equal to itself


def test_a_loss_that_is_no_number_is_heard():
    losses = [bar.loss for bar in heard("no_number.stderr") if bar.loss is not None]
    assert math.isfinite(losses[0])
    assert all(math.isnan(loss) for loss in losses[2:])


def write_states(trial: TrialLayout, name: str) -> dict[str, Any]:
    """Make the folders that the golden list names, each file whole and as small as it can be; return the list."""
    states = json.loads((GOLDEN / f"{name}.json").read_text())
    for folder, facts in states.items():
        (trial.folder / folder).mkdir(parents=True)
        for file in facts["files"]:
            path = trial.folder / folder / file
            if file.endswith(".json"):
                path.write_text(json.dumps(facts[file]))
            elif file.endswith(".safetensors"):
                save_file({"weight": torch.zeros(1)}, path)
            else:
                torch.save({}, path)
    return states


@pytest.mark.parametrize("name", ["states", "states_of_resumed"])
def test_the_newest_numbered_state_is_gone_on_from(tmp_path: Path, name: str):
    """The final one has nothing left to train."""
    trial = StudyLayout(tmp_path).trial(1)
    write_states(trial, name)
    assert KOHYA.resume_point(trial) == ResumePoint(trial.folder / "lora_trial_1-000002-state", 2)


def test_a_state_that_a_killed_training_left_is_none(tmp_path: Path):
    """sd-scripts writes the five files in this order."""
    order = ("train_state.json", "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl")
    trial = StudyLayout(tmp_path).trial(1)
    facts = write_states(trial, "states")["lora_trial_1-000002-state"]
    assert set(facts["files"]) == set(order)
    for file in reversed(order):
        (trial.folder / "lora_trial_1-000002-state" / file).unlink()
        assert KOHYA.resume_point(trial) is None, file


def test_sd_scripts_knows_every_option_that_is_written():
    """An option it does not know would be passed over in silence, and the trial would train with a default."""
    run = read_model(FORMATS / "run.json", Run)
    trainer = Trainer(name="kohya", python="/kohya/python", directory="/kohya/sd-scripts", family="sd15")
    settings = {"dataset-config": "/data/dataset.toml", "save-every-n-epochs": 2, "device": "cpu", "seed": 42}
    run = run.model_copy(update={"trainer": trainer, "settings": settings})
    plan = KOHYA.plan(read_model(FORMATS / "params.json", TrialParams), StudyLayout(Path("/study")).trial(5), run)
    written = tomllib.loads(plan.files["train_config.toml"])
    assert len(written) > 15
    assert written.keys() <= set(json.loads((GOLDEN / "options.json").read_text()))


@pytest.fixture(scope="module")
def native_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native trainer's LoRA of the training that made lora.json."""
    root = tmp_path_factory.mktemp("native")
    base = save_narrow_model(root / "narrow_base")
    train_native(training_settings(base, write_pictures(root), root / "out"), root / "out")
    return root / "out/lora_trial_1.safetensors"


def test_the_native_trainer_writes_the_same_tensors(native_lora: Path):
    golden = json.loads((GOLDEN / "lora.json").read_text())["tensors"]
    assert len(golden) == 3 * (192 + 72)
    assert {name: [entry["dtype"], entry["shape"]] for name, entry in header_of(native_lora)[0].items()} == golden
    alphas = {float(tensor) for name, tensor in load_file(native_lora).items() if name.endswith(".alpha")}
    assert alphas == {float(json.loads((GOLDEN / "lora.json").read_text())["metadata"]["ss_network_alpha"])}


def test_the_native_trainer_writes_the_same_metadata(native_lora: Path):
    golden, ours = json.loads((GOLDEN / "lora.json").read_text())["metadata"], header_of(native_lora)[1]
    assert golden.keys() - ours.keys() == {"ss_sd_scripts_commit_hash"}  # no commit of theirs trained ours
    assert ours.keys() - golden.keys() == set()
    assert {key for key in ours if ours[key] != golden[key]} <= OF_ITS_RUN
    assert {f"ss_{name}" for name in SETTINGS} <= golden.keys()
