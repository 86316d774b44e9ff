"""The kohya trainer's plans: what it writes for sd-scripts, and how it starts them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import ResumePoint, holds_out
from optimizer_daemon.trainers.kohya_checks import require_bucket_steps, require_kohya_base_model
from optimizer_daemon.trainers.kohya_data import dataset_path
from shared.errors import SettingsError, UserError
from shared.files import read_model
from shared.layout import StudyLayout
from shared.schemas import Run, Trainer, TrialParams
from tests.scenarios.test_single_file_study import as_single_file

GOLDEN = Path(__file__).parents[2] / "data/formats/v1"
KOHYA = TRAINERS.load("kohya")
STUDY = StudyLayout(Path("/study"))
SETTINGS = {"dataset-config": "/data/luca/dataset.toml", "save-every-n-epochs": 2, "device": "auto", "seed": 42}


def study(family: str = "sd15", *, clip_skip: int = 2, device: str = "auto", **options: Any) -> Run:
    """The golden study, trained by kohya on a GPU unless `device` says otherwise."""
    run = read_model(GOLDEN / "run.json", Run)
    assert run.plan is not None
    trainer = Trainer(
        name="kohya", python="/kohya/venv/bin/python", directory="/kohya/sd-scripts", family=family, options=options
    )
    plan = run.plan.model_copy(update={"clip_skip": clip_skip, "dtype": "float32" if device == "cpu" else "float16"})
    return run.model_copy(update={"trainer": trainer, "plan": plan, "settings": {**SETTINGS, "device": device}})


def params(**changes: Any) -> TrialParams:
    golden = read_model(GOLDEN / "params.json", TrialParams)
    parameters = {**golden.parameters, **changes.pop("parameters", {})}
    return golden.model_copy(update={"parameters": parameters, **changes})


def plan_of(run: Run, trial_params: TrialParams | None = None, **how: Any):
    return KOHYA.plan(trial_params or params(), STUDY.trial(5), run, **how)


def config_of(run: Run, trial_params: TrialParams | None = None) -> dict[str, Any]:
    return tomllib.loads(plan_of(run, trial_params).files["train_config.toml"])


def test_the_script_is_started_directly_on_the_trials_own_file():
    run = study()
    plan = plan_of(run)
    assert plan.argv == (
        "/kohya/venv/bin/python",
        "/kohya/sd-scripts/train_network.py",
        "--config_file",
        "/study/trial_0005/train_config.toml",
    )
    assert plan.cwd == Path("/kohya/sd-scripts")
    assert plan.env == {
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "240",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "/study/trainer_cache/python",
    }
    assert list(plan.files) == ["train_config.toml"]
    assert plan == plan_of(run)


SD15 = f"""\
pretrained_model_name_or_path = "/data/models/tiny_base"
dataset_config = "{dataset_path(study(), STUDY)}"
output_dir = "/study/trial_0005"
output_name = "lora_trial_5"
logging_dir = "/study/trial_0005/logs"
save_every_n_epochs = 2
save_model_as = "safetensors"
save_state = true
save_last_n_epochs_state = 1
network_module = "networks.lora"
save_precision = "fp16"
mixed_precision = "fp16"
gradient_checkpointing = true
sdpa = true
cache_latents = true
cache_latents_to_disk = true
max_data_loader_n_workers = 8
tokenizer_cache_dir = "/study/trainer_cache/tokenizers"
validation_seed = 42
clip_skip = 2
learning_rate = 8.7e-05
text_encoder_lr = [4.1e-05]
network_dim = 128
network_alpha = 96
optimizer_type = "AdamW"
lr_scheduler = "cosine"
gradient_accumulation_steps = 2
max_train_epochs = 4
lr_warmup_steps = 150
seed = 1337
"""


def test_the_file_of_a_stable_diffusion_trial():
    assert plan_of(study()).files["train_config.toml"] == SD15


def test_an_sdxl_trial_has_the_other_script_a_whole_vae_and_no_clip_skip():
    run = study("sdxl", clip_skip=1)
    expected = SD15.replace("clip_skip = 2", "no_half_vae = true").replace(
        str(dataset_path(study(), STUDY)), str(dataset_path(run, STUDY))
    )
    assert plan_of(run).files["train_config.toml"] == expected
    assert plan_of(run).argv[1] == "/kohya/sd-scripts/sdxl_train_network.py"


def test_a_cpu_trains_in_32_bits():
    assert config_of(study(device="cpu"))["mixed_precision"] == "no"


@pytest.mark.parametrize("gpu", ["GPU-7f", "", None])
def test_a_gpu_is_chosen_by_what_kohya_sees(gpu: str | None):
    assert plan_of(study(device="cuda:1"), gpu=gpu).env.get("CUDA_VISIBLE_DEVICES") == gpu


def test_a_state_is_gone_on_from_with_the_epoch_that_follows():
    state = STUDY.trial(5).kohya_training_state(2)
    plan = plan_of(study(), resume=ResumePoint(state, 2))
    assert plan.argv[4:] == ("--resume", "/study/trial_0005/lora_trial_5-000002-state", "--initial_epoch", "3")
    assert plan.files == plan_of(study()).files


def test_the_table_of_the_study_file_wins_over_the_defaults_and_the_trial_over_both():
    run = study(mixed_precision="bf16", max_data_loader_n_workers=0, network_dim=8, min_snr_gamma=5)
    config = config_of(run)
    assert (config["mixed_precision"], config["max_data_loader_n_workers"], config["min_snr_gamma"]) == ("bf16", 0, 5)
    assert config["network_dim"] == 128


def test_without_cached_latents_none_are_cached_on_disk():
    config = config_of(study(cache_latents=False))
    assert (config["cache_latents"], config["cache_latents_to_disk"]) == (False, False)


@pytest.mark.parametrize(
    ("options", "parameters", "name", "written"),
    [
        (
            {"optimizer_args": {"weight_decay": 0.1, "foo": "it's"}},
            {},
            "optimizer_args",
            ["weight_decay=0.1", 'foo="it\'s"'],
        ),
        ({"optimizer_args": ["betas=(0.9, 0.99)"]}, {}, "optimizer_args", ["betas=(0.9, 0.99)"]),
        ({"optimizer_args": ["eps=1e-8"]}, {"optimizer_args.eps": 1e-6}, "optimizer_args", ["eps=1e-06"]),
        ({"network_args": ["conv_dim=4", "algo=a=b"]}, {}, "network_args", ["conv_dim=4", "algo=a=b"]),
        ({}, {"network_args.conv_dim": 8}, "network_args", ["conv_dim=8"]),
        ({"lr_scheduler_args": {"mode": "min"}}, {}, "lr_scheduler_args", ["mode='min'"]),
        (
            {},
            {"optimizer_type": "Adafactor"},
            "optimizer_args",
            ["scale_parameter=False", "relative_step=False", "warmup_init=False"],
        ),
        ({}, {"text_encoder_lr": 1}, "text_encoder_lr", [1.0]),
    ],
    ids=[
        "a table, texts quoted",
        "kohya's own list",
        "the trial over the table",
        "a network argument is a text as it stands",
        "a searched network argument",
        "an argument of the scheduler",
        "Adafactor with the rates it is given",
        "a whole number as a rate",
    ],
)
def test_lists_of_arguments_are_written_as_kohya_splits_them(options, parameters, name: str, written: list[Any]):
    assert config_of(study(**options), params(parameters=parameters))[name] == written


@pytest.mark.parametrize(
    ("options", "parameters", "message"),
    [
        ({"save_every_n_epochs": 0}, {}, r"\[trainer.kohya\] save_every_n_epochs: 0 will not do, .* divide by it"),
        ({"output_dir": "/tmp"}, {}, r"\[trainer.kohya\] output_dir: the study itself decides it; take it out"),
        ({"num_processes": 2}, {}, "num_processes: it belongs to accelerate launch, which leaves the training alive"),
        ({"save_last_n_epochs": 1}, {}, "save_last_n_epochs: it would delete checkpoints before they are scored"),
        ({"optimizer_args": {"name": "a=b"}}, {}, "optimizer_args.name: 'a=b' will not do, for kohya splits at every"),
        ({"optimizer_args": ["mode=min"]}, {}, "optimizer_args: mode=min will not do; .* a text needs quotes"),
        ({"optimizer_args": "eps=1"}, {}, "optimizer_args: 'eps=1' will not do; write a table, or a list"),
        ({"python_path": "opt"}, {}, "python_path: 'opt' will not do; write a folder"),
        ({"deep": {"er": 1}}, {}, "{'er': 1} will not do; sd-scripts take texts, numbers, true, false and lists"),
        ({}, {"seed": 3}, "trial parameters: seed: the seed is --seed; take it out of the search space"),
        (
            {},
            {"resolution": "512"},
            "resolution: all trials share the linked captions and cached latents, which depend on it",
        ),
        ({}, {"lr_scheduler": "constant"}, "'constant' has no warm-up but lr_warmup_steps is 150; use constant_with"),
        ({}, {"lr_warmup_steps": 150.0}, "lr_warmup_steps: 150.0 will not do, .* a share of all steps"),
    ],
)
def test_what_kohya_would_take_wrongly_is_refused(options, parameters, message: str):
    with pytest.raises(UserError, match=message):
        plan_of(study(**options), params(parameters=parameters))


def test_sdxl_has_no_clip_skip_to_set():
    run = study("sdxl", clip_skip=1)
    with pytest.raises(UserError, match="clip_skip: kohya's SDXL training pays no heed to it"):
        plan_of(run.model_copy(update={"trainer": run.trainer.model_copy(update={"options": {"clip_skip": 2}})}))


def test_a_seed_that_numpy_cannot_take_is_refused():
    with pytest.raises(UserError, match="--seed: kohya's generators take at most 4294967295"):
        plan_of(study(), params(training_seed=2**32))


def test_held_out_pictures_are_promised_to_be_left_out():
    assert holds_out(KOHYA)


def test_a_single_file_with_configurations_of_its_own_is_no_base_model_for_kohya(tmp_path: Path):
    file = as_single_file(tmp_path)
    with pytest.raises(SettingsError, match=r"kohya never reads tiny\.config beside it"):
        require_kohya_base_model(file, {})


@pytest.mark.parametrize(
    ("family", "general", "refused"),
    [
        ("sd15", "enable_bucket = true\nbucket_reso_steps = 32", True),
        ("sd15", "enable_bucket = true\nbucket_reso_steps = 128", False),
        ("sd15", "enable_bucket = true", False),
        ("sd15", "bucket_reso_steps = 32", False),
        ("sdxl", "enable_bucket = true\nbucket_reso_steps = 32", False),
        ("sdxl", "enable_bucket = true\nbucket_reso_steps = 48", True),
    ],
)
def test_buckets_whose_steps_kohya_would_refuse_only_when_it_trains(
    tmp_path: Path, family: str, general: str, refused: bool
):
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(f"[general]\n{general}\n[[datasets]]\nresolution = 512\n")
    document = tomllib.loads(dataset.read_text())
    if not refused:
        require_bucket_steps(dataset, document, {}, family)
        return
    wanted = 64 if family == "sd15" else 32
    with pytest.raises(UserError, match=rf"line 3: datasets\[0\].bucket_reso_steps: .* multiples of {wanted}"):
        require_bucket_steps(dataset, document, {}, family)
