"""The native trainer's plans, and how it reads its training's output."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from optimizer_daemon.lora_training.config import load_config
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import holds_out
from shared.errors import SettingsError, UnknownPluginError, UserError
from shared.files import read_model
from shared.layout import StudyLayout
from shared.progress_bar import Progress
from shared.schemas import Run, TrialParams

GOLDEN = Path(__file__).parents[2] / "data/formats/v1"
NATIVE = TRAINERS.load("native")


@pytest.fixture
def run() -> Run:
    run = read_model(GOLDEN / "run.json", Run)
    settings = {"dataset-config": "/data/luca/dataset.toml", "save-every-n-epochs": 3, "device": "cpu"}
    return run.model_copy(update={"settings": settings})


def params(**changes) -> TrialParams:
    golden = read_model(GOLDEN / "params.json", TrialParams)
    parameters = {**golden.parameters, **changes.pop("parameters", {})}
    return golden.model_copy(update={"parameters": parameters, **changes})


def plan_of(run: Run, trial_params: TrialParams | None = None, gpu: str | None = None, root: Path = Path("/study")):
    return NATIVE.plan(trial_params or params(), StudyLayout(root).trial(5), run, gpu)


def test_the_plan_starts_the_native_training_on_the_trials_own_config(run: Run):
    plan = plan_of(run)
    config = "/study/trial_0005/train_config.toml"
    assert plan.argv == (run.trainer.python, "-m", "optimizer_daemon.lora_training", "--config", config)
    assert plan.env == {
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "240",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    assert plan.cwd is not None and (plan.cwd / "optimizer_daemon/lora_training/__main__.py").is_file()
    assert list(plan.files) == ["train_config.toml"]
    assert tomllib.loads(plan.files["train_config.toml"]) == {
        "pretrained_model_name_or_path": "/data/models/tiny_base",
        "dataset_config": "/data/luca/dataset.toml",
        "gradient_checkpointing": "auto",
        "held_out": [picture.sha256 for picture in run.pictures.held_out],
        "output_dir": "/study/trial_0005",
        "output_name": "lora_trial_5",
        "logging_dir": "/study/trial_0005/logs",
        "state_dir": "/study/trial_0005/state",
        "resume": True,
        "network_dim": 128,
        "network_alpha": 96.0,
        "learning_rate": 8.7e-05,
        "text_encoder_lr": 4.1e-05,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 150,
        "gradient_accumulation_steps": 2,
        "max_train_epochs": 4,
        "save_every_n_epochs": 3,
        "seed": 1337,
        "device": "cpu",
        "threads": 1,
    }


def test_the_written_config_is_what_the_training_reads(run: Run, tmp_path: Path):
    trial_params = params(parameters={"optimizer_args.weight_decay": 0.1, "min_snr_gamma": 5})
    plan = plan_of(run, trial_params, root=tmp_path)
    (tmp_path / "train_config.toml").write_text(plan.files["train_config.toml"])
    config = load_config(tmp_path / "train_config.toml")
    assert (config.optimizer_args, config.min_snr_gamma, config.network_alpha) == ({"weight_decay": 0.1}, 5.0, 96.0)


def test_equal_arguments_give_equal_plans_that_nobody_can_change(run: Run):
    plan = plan_of(run)
    assert plan == plan_of(run)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.cwd = Path()


def test_the_same_pictures_validate_whatever_the_seed_of_the_training(run: Run):
    """A finalist repeats a trial with a seed of its own, so its validation loss must be on the same pictures."""
    run = run.model_copy(update={"settings": {**run.settings, "seed": 7}})
    plans = [plan_of(run, params(training_seed=seed)).files["train_config.toml"] for seed in (7, 1000)]
    found = [tomllib.loads(text) for text in plans]
    assert [(each["seed"], each["validation_seed"]) for each in found] == [(7, 7), (1000, 7)]
    trainer = run.trainer.model_copy(update={"options": {"validation_seed": 3}})
    asked = plan_of(run.model_copy(update={"trainer": trainer})).files["train_config.toml"]
    assert tomllib.loads(asked)["validation_seed"] == 3


def test_a_gpu_slot_is_all_the_training_sees(run: Run):
    assert plan_of(run, gpu="GPU-7f").env["CUDA_VISIBLE_DEVICES"] == "GPU-7f"
    assert "CUDA_VISIBLE_DEVICES" not in plan_of(run).env


@pytest.mark.parametrize(("clip_skip", "written"), [(1, None), (2, 2)], ids=["last layer", "one layer skipped"])
def test_the_training_skips_the_layers_that_the_evaluation_skips(run: Run, clip_skip: int, written: int | None):
    assert run.plan is not None
    run = run.model_copy(update={"plan": run.plan.model_copy(update={"clip_skip": clip_skip})})
    assert tomllib.loads(plan_of(run).files["train_config.toml"]).get("clip_skip") == written


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"networkdim": 8}, "networkdim: the native trainer has no such setting; did you mean 'network_dim'?; correct"),
        ({"brightness": 0.5}, "brightness: the native trainer has no such setting; correct the search space"),
        ({"learning_rate_ratio": 0.5}, "learning_rate_ratio: the native trainer has no such setting"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler: 'cosin' will not do"),
        ({"network_dim": 0}, "network_dim: 0 will not do"),
        ({"network_dim": 64.0}, "network_dim: 64.0 will not do"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 will not do"),
        ({"lr_scheduler": "constant"}, "lr_scheduler 'constant' has no warm-up but lr_warmup_steps is 150"),
    ],
    ids=[
        "a misspelt parameter",
        "a parameter of nobody",
        "a ratio nothing was derived from",
        "an unknown schedule",
        "rank 0",
        "a rank that is no whole number",
        "no learning rate",
        "a warm-up without a schedule",
    ],
)
def test_a_parameter_that_cannot_be_trained_with_is_refused_before_the_start(run: Run, parameters, message: str):
    with pytest.raises(UserError) as caught:
        plan_of(run, params(parameters=parameters))
    assert str(caught.value).startswith(f"trial parameters: {message}")


def test_a_study_without_data_set_is_refused_by_its_flag(run: Run):
    with pytest.raises(SettingsError, match=r"^--dataset-config: None will not do"):
        plan_of(run.model_copy(update={"settings": {}}))


def test_unknown_trainers_are_refused_with_the_known_ones():
    with pytest.raises(UnknownPluginError, match=r"no trainer named 'kohia'; choose one of .*native"):
        TRAINERS.load("kohia")


@pytest.mark.parametrize(
    ("device", "dataset", "shape"),
    [
        ("cpu", "resolution = [96, 64]\nbatch_size = 3", [3, 64, 96]),
        ("cpu", "resolution = 64", [2, 64, 64]),  # batches as [trainer.native] train_batch_size says
        ("cpu", "resolution = 64\nenable_bucket = true\nmin_bucket_reso = 64", None),  # they differ in size
        ("cuda", "resolution = 64", None),
    ],
)
def test_weights_are_packed_before_the_fork_for_batches_that_are_all_alike(
    run: Run, tmp_path: Path, monkeypatch, device, dataset, shape
):
    (tmp_path / "dataset.toml").write_text(f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'pictures'\n")
    settings = {"dataset-config": str(tmp_path / "dataset.toml"), "device": device}
    trainer = run.trainer.model_copy(update={"python": None, "options": {"train_batch_size": 2}})
    base = Path("examples/tiny_world/base_model").absolute()
    study = run.model_copy(update={"settings": settings, "trainer": trainer, "base_model": str(base)})
    assert json.loads(NATIVE.preload(study).call[1])["batch_shape"] == shape


def test_trainings_in_our_python_are_forked_from_one_that_has_loaded_the_model(run: Run):
    ours, other = (
        run.model_copy(update={"trainer": run.trainer.model_copy(update={"python": python})})
        for python in (None, "/opt/python")
    )
    preload = NATIVE.preload(ours)
    assert preload.modules == ("optimizer_daemon.lora_training.train",)
    asked = json.loads(preload.call[1])
    assert asked == {"base_model": str(Path(run.base_model).absolute()), "batch_shape": None}
    assert (preload.env["OMP_NUM_THREADS"], preload.cwd) == ("1", plan_of(ours).cwd)
    assert NATIVE.preload(other) is None


def test_planning_imports_nothing_heavy():
    code = (
        "import sys; import optimizer_daemon.trainers.native; "
        "print(sorted({'torch', 'numpy', 'diffusers', 'transformers', 'PIL', 'tqdm'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # The first four are lines of a real sd-scripts run.
        (
            "steps:  62%|██████▎   | 10/16 [03:04<01:50, 18.42s/it, avr_loss=1.04]",
            Progress(None, 10, 16, 1.04, 18.42, 110.0),
        ),
        ("steps:   0%|          | 0/16 [00:00<?, ?it/s]", Progress(None, 0, 16)),
        (
            "\rsteps: 100%|██████████| 16/16 [04:41<00:00, 17.62s/it, avr_loss=1.11]"
            "\rsteps: 100%|██████████| 16/16 [04:41<00:00, 17.62s/it, avr_loss=1.1] 2026-11-20 22:48:39 INFO",
            Progress(None, 16, 16, 1.1, 17.62, 0.0),
        ),
        ("100%|██████████| 2/2 [00:10<00:00,  5.23s/it]", None),
        (
            "steps:  12%|█▎        | 2/16 [00:46<05:28, 23.48s/it, avr_loss=1.17, epoch=1/4]",
            Progress(1, 2, 16, 1.17, 23.48, 328.0),
        ),
        (
            "steps:   1%|          | 90/9000 [00:45<1:14:15,  2.00it/s, avr_loss=0.0912, epoch=12/20]",
            Progress(12, 90, 9000, 0.0912, 0.5, 4455.0),
        ),
        (
            "steps:  50%|█████     | 8/16 [00:08<00:08,  1.00s/it, avr_loss=9.1e-05, epoch=2/4]",
            Progress(2, 8, 16, 9.1e-05, 1.0, 8.0),
        ),
        ("epoch validation steps:  50%|█████     | 4/8 [00:08<00:08,  2.00s/it, val_epoch_avg_loss=0.1]", None),
        ("epoch 2/4", None),
        ("encoding latents: 120/4000 images", Progress(None, 120, 4000, preparing="latents")),
        ("saving checkpoint: /study/trial_0005/lora_trial_5-000002.safetensors", None),
        ("", None),
    ],
    ids=[
        "kohya's bar",
        "kohya's first bar",
        "two bars in one line tell the later",
        "the bar of a rendering",
        "our bar with the epoch",
        "steps faster than a second, hours to go",
        "a tiny loss",
        "the bar of a validation",
        "an epoch line",
        "images that are encoded before the first step",
        "a checkpoint line",
        "nothing",
    ],
)
def test_progress_is_read_from_the_bar(line: str, expected: Progress | None):
    assert NATIVE.parse_progress(line) == expected


def test_a_loss_that_is_no_number_is_read_as_such():
    progress = NATIVE.parse_progress("steps:  50%|█████     | 8/16 [00:08<00:08,  1.00s/it, avr_loss=nan, epoch=2/4]")
    assert progress is not None and progress.loss is not None and progress.loss != progress.loss


def test_only_a_trainer_that_promises_it_counts_as_leaving_held_out_pictures_out():
    assert holds_out(NATIVE)
    assert not holds_out(SimpleNamespace())
    assert not holds_out(SimpleNamespace(holds_out=False))
    assert not holds_out(SimpleNamespace(holds_out="no"))


def test_a_drawn_argument_joins_those_of_the_study_file(run: Run):
    trainer = run.trainer.model_copy(update={"options": {"lr_scheduler_args": {"lr_end": 1e-6, "power": 3}}})
    run = run.model_copy(update={"trainer": trainer})
    plan = plan_of(run, params(parameters={"lr_scheduler": "polynomial", "lr_scheduler_args.power": 2}))
    assert tomllib.loads(plan.files["train_config.toml"])["lr_scheduler_args"] == {"lr_end": 1e-6, "power": 2}


def test_a_search_space_draws_an_argument_by_two_underscores(run: Run):
    plan = plan_of(run, params(parameters={"network_args__conv_dim": 8, "optimizer_args__weight_decay": 0.1}))
    written = tomllib.loads(plan.files["train_config.toml"])
    assert (written["network_args"], written["optimizer_args"]) == ({"conv_dim": 8}, {"weight_decay": 0.1})
    with pytest.raises(UserError, match="there is no 'conv_rank' here; the arguments are conv_dim, conv_alpha"):
        plan_of(run, params(parameters={"network_args__conv_rank": 8}))
