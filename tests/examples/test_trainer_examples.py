"""The study files for other people's trainers: they are filled in, and what they fill in is read by those programs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from optimizer_daemon.collecting.job import Job
from optimizer_daemon.collecting.patterns import Pattern
from optimizer_daemon.collecting.progress import Translator, bar, parse_line
from optimizer_daemon.search.load import load_space
from optimizer_daemon.settings import load_optimizer_settings
from optimizer_daemon.trainers.base import ResumePoint
from shared.files import read_model
from shared.layout import StudyLayout
from shared.safetensors_file import lora_modules, read_checkpoint
from shared.schemas import Run, TrialParams
from tests.optimizer_daemon.trainers.bench import Bench

EXAMPLES = Path(__file__).parents[2] / "examples/trainers"
GOLDEN = Path(__file__).parents[1] / "data/formats/v1"
NAMES = ["ai_toolkit", "diffusers", "onetrainer"]


def planned(name: str, resume: ResumePoint | None = None) -> tuple[Job, dict[str, str], dict[str, str]]:
    """Plan a trial of an example; return its job, its files and its environment."""
    from optimizer_daemon.study_file import trainer_of
    from optimizer_daemon.trainers.command import TRAINER

    settings = load_optimizer_settings(argparse.Namespace(config=EXAMPLES / f"{name}.toml"))
    run = read_model(GOLDEN / "run.json", Run).model_copy(
        update={
            "base_model": str(settings.base_model),
            "trainer": trainer_of(settings),
            "settings": {"dataset-config": str(settings.dataset_config), "save-every-n-epochs": 2},
        }
    )
    parameters = {"learning_rate": 1e-05, "network_dim": 16, "network_alpha": 8, "max_train_epochs": 8}
    params = read_model(GOLDEN / "params.json", TrialParams).model_copy(
        update={"parameters": parameters, "derived": ()}
    )
    plan = TRAINER.plan(params, StudyLayout(Path("/study")).trial(5), run, resume=resume)
    files = {Path(path).name: text for path, text in plan.files.items()}
    return Job.model_validate_json(files.pop("collect.json")), files, dict(plan.env)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_names_a_search_space_and_both_daemons(name: str):
    text = (EXAMPLES / f"{name}.toml").read_text()
    assert set(tomllib.loads(text)) == {"optimizer", "evaluator", "trainer"}
    load_space(str(EXAMPLES / "search_space.toml"))
    planned(name)


def test_diffusers_example():
    job, files, env = planned("diffusers")
    assert job.command[:2] == (
        "/opt/diffusers/venv/bin/python",
        "/opt/diffusers/examples/text_to_image/train_text_to_image_lora.py",
    )
    told = dict(zip(job.command[2::2], job.command[3::2], strict=True))
    assert (told["--max_train_steps"], told["--checkpointing_steps"], told["--rank"]) == ("48", "12", "16")
    assert (told["--learning_rate"], told["--train_data_dir"]) == ("1.0e-05", "/study/trainer_cache/pictures")
    assert files == {} and env["HF_HUB_OFFLINE"] == "1"
    state = Path("/study/trial_0005/output/checkpoint-24/random_states_0.pkl")
    resumed, _, _ = planned("diffusers", ResumePoint(state))
    assert resumed.command == (*job.command, "--resume_from_checkpoint", "/study/trial_0005/output/checkpoint-24")


def test_ai_toolkit_example():
    job, files, env = planned("ai_toolkit")
    assert job.command == ("/opt/ai-toolkit/venv/bin/python", "run.py", "/study/trial_0005/command/job.yaml")
    assert (job.cwd, env["SEED"]) == (Path("/opt/ai-toolkit"), "1337")
    config = yaml.safe_load(files["job.yaml"])["config"]
    process = config["process"][0]
    assert config["name"] == "lora_trial_5"
    assert process["training_folder"] == "/study/trial_0005/output"
    assert process["network"] == {"type": "lora", "linear": 16, "linear_alpha": 8}
    assert (process["train"]["lr"], process["train"]["steps"], process["save"]["save_every"]) == (1e-05, 192, 48)
    assert process["datasets"][0]["folder_path"] == "/study/trainer_cache/pictures"


def test_onetrainer_example():
    job, files, _ = planned("onetrainer")
    assert job.command[1:4] == ("scripts/train.py", "--preset-path", "training_presets/SD1.5/#sd 1.5 LoRA.json")
    config, concepts = json.loads(files["config.json"]), json.loads(files["concepts.json"])
    assert (config["learning_rate"], config["lora_rank"], config["lora_alpha"], config["epochs"]) == (1e-05, 16, 8, 8)
    assert config["output_model_destination"] == "/study/trial_0005/output/final.safetensors"
    assert concepts[0]["path"] == "/study/trainer_cache/pictures" and concepts[0]["seed"] == 1337
    assert job.stop_signal == "SIGINT"


@pytest.mark.parametrize(
    ("name", "file", "unit", "number"),
    [
        ("ai_toolkit", "lora_trial_5/lora_trial_5_000000048.safetensors", "step", 48),
        ("diffusers", "checkpoint-12/pytorch_lora_weights.safetensors", "step", 12),
        ("onetrainer", "workspace/save/2026-08-19_21-38-17-save-12-2-0.safetensors", "epoch", 2),
    ],
)
def test_the_names_of_their_checkpoints_are_found(tmp_path: Path, name: str, file: str, unit: str, number: int):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.touch()
    job, _, _ = planned(name)
    [match] = [match for text in job.checkpoints for match in Pattern(text).find(tmp_path)]
    assert (match.path, match.unit, match.number) == (path, unit, number)


@pytest.mark.parametrize(
    ("name", "lines", "step", "steps", "loss"),
    [
        ("diffusers", ["Steps:  25%|##5  | 12/48 [00:36<01:48,  3.01s/it, lr=0.0001, step_loss=0.31]"], 12, 48, 0.31),
        (
            "ai_toolkit",
            ["lora_trial_5:  25%|##5   | 48/192 [01:36<04:48,  2.00s/it, lr: 1.0e-04 loss: 3.200e-01]"],
            48,
            192,
            0.32,
        ),
        (
            "onetrainer",
            [
                "epoch:  12%|#2   | 1/8 [00:20<02:20, 20.0s/it]",
                "step:  50%|#####   | 3/6 [00:10<00:10,  3.3s/it, loss=0.125, smooth loss=0.13]",
            ],
            9,
            48,
            0.125,
        ),
    ],
)
def test_their_progress_is_read(name: str, lines: list[str], step: int, steps: int, loss: float):
    job, _, _ = planned(name)
    progress = Translator(job).read(lines)
    assert progress is not None
    assert (progress.step, progress.steps, progress.loss, progress.epoch) == (step, steps, loss, step * 8 // steps + 1)
    assert parse_line(bar(progress, 8)) == progress


def test_a_bar_over_something_else_is_preparation_until_the_first_step():
    job, _, _ = planned("diffusers")
    translator = Translator(job)
    other = "Loading weights: 100%|##########| 36/36 [00:00<00:00, 8176.47it/s]"
    progress = translator.read([other])
    assert progress is not None and (progress.step, progress.steps, progress.preparing) == (36, 36, "model and data")
    assert parse_line(bar(progress, 8)) == progress
    assert translator.read([other]) is None
    assert translator.read(["Steps:   2%|2  | 1/48 [00:03<02:20,  3.01s/it, lr=0.0001, step_loss=0.3]"]) is not None
    assert translator.read(["Steps:   2%|2  | 1/48 [00:03<02:20,  3.01s/it, lr=0.0001, step_loss=0.3]"]) is None
    assert translator.read(["Sampling:  50%|#####     | 10/20 [00:03<00:03,  3.01it/s]"]) is None


# ------------------------------------------------------------------------------------- the diffusers example for real


def why_not() -> str:
    """Say what is missing for a training by the real example; nothing when all is there."""
    folder, python = os.environ.get("DIFFUSERS_DIR"), os.environ.get("DIFFUSERS_PYTHON", sys.executable)
    if folder is None:
        return "needs DIFFUSERS_DIR, a checkout of diffusers"
    probe = subprocess.run([python, "-c", "import datasets, torchvision, peft, accelerate"], capture_output=True)
    return "" if probe.returncode == 0 else f"{python} lacks what the example imports, such as datasets"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_diffusers_example_trains_a_trial(tmp_path: Path):
    if missing := why_not():
        pytest.skip(missing)
    text = (EXAMPLES / "diffusers.toml").read_text()
    table = text[text.index("[trainer.command]") :].replace("/opt/diffusers", os.environ["DIFFUSERS_DIR"])
    table = table.replace('"512"', '"64"').replace(
        'unused = ["network_alpha"]', 'unused = ["network_alpha", "optimizer_type"]'
    )
    python = os.environ.get("DIFFUSERS_PYTHON", sys.executable)
    with Bench(tmp_path, "command", f'trainer_python = "{python}"\n{table}') as bench:
        bench.start()
        bench.wait_for_step(7)
        assert bench.stop() is not None and bench.strays() == {}
        assert bench.plugin.resume_point(bench.trial) is not None, bench.log
        bench.start()
        assert bench.finish().exit_status == 0, bench.log
        assert "Resuming from checkpoint checkpoint-6" in bench.log
        assert bench.checkpoints == ["lora_trial_1-000001.safetensors", "lora_trial_1.safetensors"]
        for path in bench.trial.list_checkpoints():
            assert len(lora_modules(read_checkpoint(path, bench.trial.folder)).modules) > 0
