"""What a study finds out about its pictures and its optimizer before it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from optimizer_daemon.lora_training.dataset import check_data
from optimizer_daemon.lora_training.optimizer_names import NAMED, class_path, require_optimizer
from optimizer_daemon.trainers.base import TrainerInput
from optimizer_daemon.trainers.native import TRAINER
from shared.errors import UserError
from shared.schemas import Trainer
from tests.optimizer_daemon.lora_training.pictures import write_dataset
from tests.optimizer_daemon.lora_training.workshop import Workshop


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


def given(workshop: Workshop, **options) -> TrainerInput:
    trainer = Trainer(name="native", options=options)
    return TrainerInput(workshop.base, workshop.root / "dataset.toml", None, trainer, "cpu")


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
