"""What a study finds out about its pictures and its optimizer before it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from optimizer_daemon.lora_training.dataset import check_data
from optimizer_daemon.lora_training.optimizer_names import NAMED, class_path, require_optimizer
from shared.errors import UserError
from tests.optimizer_daemon.lora_training.pictures import write_dataset


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


@pytest.mark.parametrize("name", ["AdamW", "adamw8bit", "LION", "RAdam", "torch.optim.SGD", "tests.conftest.Anything"])
def test_a_known_name_in_any_spelling_and_any_installed_module_may_be_an_optimizer(name):
    require_optimizer(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("AdamX", r"'AdamX' will not do; did you mean 'Adam\w*'\?, or write package", id="misspelt"),
        pytest.param("zzz", "'zzz' will not do; use one of ASGD, Adadelta", id="like none"),
        pytest.param("no_such.Adam", "no module no_such, so install its package", id="package missing"),
        pytest.param("torch.optimizers.Adam", "no module torch.optimizers", id="module missing"),
        pytest.param("LBFGS", "'LBFGS' will not do", id="one that needs the loss several times a step"),
    ],
)
def test_what_cannot_be_an_optimizer_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        require_optimizer(name)


def test_every_name_is_a_class_of_its_module():
    assert {name for name in NAMED if class_path(name).rpartition(".")[2] != name} == set()


def test_asking_for_a_module_imports_nothing():
    code = (
        "import sys; from optimizer_daemon.lora_training.optimizer_names import require_optimizer as r; "
        "r('AdamW'); r('torch.optim.SGD'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
