"""What a study finds out about its pictures and its optimizer before it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from optimizer_daemon.lora_training.choices import first_fault
from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.dataset import check_data
from optimizer_daemon.lora_training.optimizer_names import NAMED, class_path, require_optimizer
from optimizer_daemon.trainers.base import TrainerInput
from optimizer_daemon.trainers.native import TRAINER, configs_of
from optimizer_daemon.trainers.native_checks import asked_of, require_optimizers
from shared.errors import UserError
from shared.files import read_model
from shared.schemas import Trainer, TrialParams
from tests.optimizer_daemon.lora_training.pictures import write_dataset
from tests.optimizer_daemon.lora_training.workshop import Workshop

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_a_picture_that_lost_its_end_is_refused_whatever_its_format(tmp_path: Path, suffix):
    toml = write_dataset(tmp_path)
    whole = tmp_path / "images" / "b.png"
    other = whole.with_suffix(suffix)
    with Image.open(whole) as image:
        image.load()
    whole.unlink()
    image.save(other)
    check_data(toml, multiple_of=8)
    other.write_bytes(other.read_bytes()[: other.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=rf"images/b\{suffix} is no readable image .*; mend or remove it"):
        check_data(toml, multiple_of=8)


def test_a_changed_byte_inside_a_png_is_found(tmp_path: Path):
    toml = write_dataset(tmp_path)
    file = tmp_path / "images" / "b.png"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"b\.png is no readable image"):
        check_data(toml, multiple_of=8)


def given(workshop: Workshop, *drawn: dict[str, Any], **options) -> TrainerInput:
    """A study of these options, and of trials with these parameters."""
    trainer = Trainer(name="native", options=options)
    golden = read_model(Path(__file__).parents[2] / "data/formats/v1/params.json", TrialParams)
    needed = {"network_dim": 4, "network_alpha": 4.0, "learning_rate": 1e-4, "max_train_epochs": 1}
    trials = tuple(golden.model_copy(update={"parameters": needed | parameters, "derived": {}}) for parameters in drawn)
    return TrainerInput(workshop.base, workshop.root / "dataset.toml", None, trainer, "cpu", trials)


def test_the_study_file_may_say_what_a_data_set_leaves_open(workshop: Workshop):
    workshop.dataset(dataset="batch_size = 2")
    with pytest.raises(UserError, match=r"dataset\.toml: datasets\[0\]\.resolution is missing; set it there or above"):
        TRAINER.check_input(given(workshop))
    TRAINER.check_input(given(workshop, resolution=64, caption_dropout_rate=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 64, "validation_split": 1.5}, r"\[trainer\.native\] validation_split: 1\.5 will not do; "),
        ({"resolution": [64, 64, 64]}, r"\[trainer\.native\] resolution: \[64, 64, 64\] will not do; "),
        ({"resolution": 60}, r"datasets\[0\]\.resolution: \(60, 60\) will not do; this base"),
    ],
)
def test_what_the_study_file_says_of_data_sets_is_checked(workshop: Workshop, options, message: str):
    workshop.dataset(dataset="batch_size = 2")
    with pytest.raises(UserError, match=message):
        TRAINER.check_input(given(workshop, **options))


def test_a_search_space_may_say_what_a_data_set_leaves_open_and_every_choice_is_checked(workshop: Workshop):
    workshop.dataset(dataset="batch_size = 2")
    TRAINER.check_input(given(workshop, {"resolution": 64}, {"resolution": 128}))
    with pytest.raises(UserError, match=r"datasets\[0\]\.resolution: \(60, 60\) will not do; this base"):
        TRAINER.check_input(given(workshop, {"resolution": 64}, {"resolution": 60}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"zero_terminal_snr": True}, "zero_terminal_snr: True will not do; it is for velocity prediction"),
        ({"mixed_precision": "fp16"}, "mixed_precision: 'fp16' needs a GPU; use 'auto' or 'no' on a CPU"),
        ({"network_weights": "/nowhere/a.safetensors"}, "network_weights: '/nowhere/a.safetensors' will not do; it"),
        ({"network_weights": "a.safetensors"}, "network_weights: 'a.safetensors' will not do; write its whole path"),
        ({"text_encoder_lr": [1e-4, 1e-5]}, "text_encoder_lr: [0.0001, 1e-05] will not do; a base model of family"),
    ],
)
def test_what_the_base_model_the_files_or_the_device_forbid_is_refused(workshop: Workshop, parameters, message):
    workshop.dataset()
    with pytest.raises(UserError) as caught:
        TRAINER.check_input(given(workshop, {}, parameters))
    assert str(caught.value).startswith(f"trial parameters: {message}")
    assert str(caught.value).endswith("; correct the search space or [trainer.native]")


def test_each_optimizer_and_course_is_built_over_the_steps_there_will_be(workshop: Workshop):
    """3 pictures in batches of 2, twice: 4 optimizer steps."""
    workshop.dataset(dataset="batch_size = 2\nresolution = 64")
    possible = [
        {"optimizer_type": "adafactor"},
        {"optimizer_type": "RAdam", "optimizer_args.betas": [0.8, 0.9], "text_encoder_lr": 0.0},
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args.step_size": 2, "network_args.loraplus_lr_ratio": 4.0},
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 1, "lr_decay_steps": 3, "max_train_epochs": 2},
    ]
    trainings = [(_config_of(workshop, drawn), 4) for drawn in possible]
    assert first_fault(asked_of(trainings)) == ""
    for drawn, message in (
        ({"optimizer_type": "torch.optim.Nope"}, "optimizer_type: 'torch.optim.Nope' will not do; torch.optim.Nope is"),
        (
            {"optimizer_args.nonsense": 1},
            "optimizer_args: {'nonsense': 1} will not do; torch.optim.adamw.AdamW refuses",
        ),
        ({"lr_scheduler_type": "NoSuchLR"}, "lr_scheduler_type: 'NoSuchLR' will not do; torch.optim.lr_scheduler has"),
        (
            possible[-1] | {"lr_decay_steps": 4},
            "lr_decay_steps: 4 will not do; with 1 steps of warm-up it is more than",
        ),
    ):
        assert first_fault(asked_of([*trainings, (_config_of(workshop, drawn), 4)])).startswith(message)
    with pytest.raises(UserError, match=r"^trial parameters: lr_decay_steps: 2 will not do; .* all 2 optimizer steps"):
        TRAINER.check_input(
            given(workshop, {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 1, "lr_decay_steps": 2})
        )


def test_an_interpreter_that_cannot_try_is_an_error(workshop: Workshop):
    trainings = [(_config_of(workshop, {"optimizer_type": "Prodigy"}), 4)]
    with pytest.raises(UserError, match=r"^trial parameters: optimizer_type: could not be tried with /no/python \("):
        require_optimizers(trainings, "/no/python", ROOT, {})
    with pytest.raises(UserError, match=r"optimizer_type: building the optimizers failed \(exit status 1\)"):
        require_optimizers(trainings, "/bin/false", ROOT, {})


def _config_of(workshop: Workshop, drawn: dict[str, Any]) -> TrainConfig:
    (config,) = configs_of(given(workshop, drawn))
    return config


@pytest.mark.parametrize("name", ["AdamW", "adamw8bit", "LION", "RAdam", "torch.optim.SGD", "tests.conftest.Anything"])
def test_a_known_name_in_any_spelling_and_any_installed_module_may_be_an_optimizer(name):
    require_optimizer(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("AdamX", r"'AdamX' will not do; did you mean 'Adam\w*'\?, or write package", id="misspelt"),
        pytest.param("zzz", "'zzz' will not do; use one of ASGD, .*Adadelta", id="like none"),
        pytest.param("no_such.Adam", "no module no_such, so install its package", id="package missing"),
        pytest.param("torch.optimizers.Adam", "no module torch.optimizers", id="module missing"),
        pytest.param("LBFGS", "'LBFGS' will not do", id="one that needs the loss several times a step"),
    ],
)
def test_what_cannot_be_an_optimizer_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        require_optimizer(name)


def test_every_name_is_a_class_of_its_module():
    others = {name for name in NAMED if class_path(name).rpartition(".")[2] != name}
    assert others == {"SGDNesterov", "SGDNesterov8bit"}  # sd-scripts' names for SGD with an argument


def test_asking_for_a_module_imports_nothing():
    code = (
        "import sys; from optimizer_daemon.lora_training.optimizer_names import require_optimizer as r; "
        "r('AdamW'); r('torch.optim.SGD'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
