"""Images as latents, and their cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from optimizer_daemon.lora_training import latents as latents_module
from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.buckets import Fit, Size
from optimizer_daemon.lora_training.dataset import TrainingImage, load_data
from optimizer_daemon.lora_training.dataset_config import Subset
from optimizer_daemon.lora_training.latents import Latents, load_latents, read_pixels
from optimizer_daemon.lora_training.models import Hardware
from shared.errors import UserError
from shared.progress_bar import Progress, parse_preparation
from tests.optimizer_daemon.lora_training.pictures import write_dataset, write_images
from tests.optimizer_daemon.lora_training.reference import frozen_latent

CPU = Hardware(torch.device("cpu"), torch.float32)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def encoded(dataset: Path, base: Path, cache: Path) -> Latents:
    model = inspect_base_model(base)
    data = load_data(dataset, batch_size=1, multiple_of=model.vae_factor)
    return load_latents(data.images, model, CPU, cache, lambda: None)


def image_of(path: Path, size: Size, fit: Fit) -> TrainingImage:
    return TrainingImage(path, "0" * 64, size, "", fit, Subset(image_dir="images"))


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.glob("*/*"))}


def test_a_latent_is_one_frozen_sample_of_the_posterior(tmp_path: Path, base_model: Path, cache: Path):
    dataset = write_dataset(tmp_path)
    found = encoded(dataset, base_model, cache)
    data = load_data(dataset, batch_size=1, multiple_of=8)
    vae = AutoencoderKL.from_pretrained(base_model / "vae", local_files_only=True).eval()
    for batch in data.epoch_batches(1, 1):
        latents = found.of(batch)
        assert latents.shape == (len(batch), 4, 8, 8)
        for latent, draw in zip(latents, batch, strict=True):
            torch.testing.assert_close(latent, frozen_latent(vae, draw.image.path), atol=1e-5, rtol=1e-5)


def test_only_a_batch_of_them_is_on_the_training_device(tmp_path: Path, base_model: Path, cache: Path):
    dataset = write_dataset(tmp_path)
    encoded(dataset, base_model, cache)
    model = inspect_base_model(base_model)
    data = load_data(dataset, batch_size=1, multiple_of=model.vae_factor)
    elsewhere = Hardware(torch.device("meta"), torch.float32)  # a device without memory of its own
    found = load_latents(data.images, model, elsewhere, cache, lambda: None)
    assert {tensor.device.type for tensor in found._tensors.values()} == {"cpu"}
    assert found.of(data.epoch_batches(1, 1)[0]).device.type == "meta"


def test_a_long_encoding_says_how_far_it_is(tmp_path: Path, base_model: Path, cache: Path, monkeypatch, capsys):
    monkeypatch.setattr(latents_module, "_SAY_EVERY_S", 0.0)
    dataset = write_dataset(tmp_path)
    encoded(dataset, base_model, cache)
    lines = [f"encoding latents: {done}/3 images" for done in (1, 2, 3)]
    assert capsys.readouterr().out.splitlines() == lines
    assert parse_preparation(lines[1]) == Progress(None, 2, 3, preparing="latents")
    encoded(dataset, base_model, cache)
    assert capsys.readouterr().out == ""


def test_the_second_training_loads_no_vae(tmp_path: Path, base_model: Path, cache: Path, monkeypatch):
    dataset = write_dataset(tmp_path)
    first = encoded(dataset, base_model, cache)
    assert (first.encoded, first.cached) == (3, 0)
    kept = files(cache)
    loads: list[str] = []
    monkeypatch.setattr(latents_module, "load_vae", lambda *_: loads.append("vae"))
    second = encoded(dataset, base_model, cache)
    assert (second.encoded, second.cached, loads) == (0, 3, [])
    assert files(cache) == kept
    batch = load_data(dataset, batch_size=1, multiple_of=8).epoch_batches(1, 1)[0]
    assert torch.equal(first.of(batch), second.of(batch))


def test_what_decides_a_latent_decides_its_file(tmp_path: Path, base_model: Path, velocity_model: Path, cache: Path):
    one = write_dataset(tmp_path / "one", {"a": "x", "b": "y"})
    assert encoded(one, base_model, cache).encoded == 2
    assert encoded(write_dataset(tmp_path / "copy", {"a": "another caption", "b": "y"}), base_model, cache).encoded == 0
    write_images(tmp_path / "copy/images", {"a": "x"}, seed=5)
    assert encoded(tmp_path / "copy/dataset.toml", base_model, cache).encoded == 1, "an edited image"
    smaller = write_dataset(tmp_path / "smaller", {"a": "x", "b": "y"}, dataset="resolution = 32")
    assert encoded(smaller, base_model, cache).encoded == 2, "another size"
    other = write_dataset(
        tmp_path / "other", {"a": "x", "b": "y"}, dataset="resolution = 32", subset="resize_interpolation = 'bicubic'"
    )
    assert encoded(other, base_model, cache).encoded == 2, "another way to resize"
    unsized = write_dataset(tmp_path / "unsized", {"a": "x", "b": "y"}, subset="resize_interpolation = 'bicubic'")
    assert encoded(unsized, base_model, cache).encoded == 0, "nothing is resized"
    flipped = write_dataset(tmp_path / "flipped", {"a": "x", "b": "y"}, subset="flip_aug = true")
    assert encoded(flipped, base_model, cache).encoded == 2, "only the mirrored ones are new"
    config = velocity_model / "vae/config.json"
    text = config.read_text()
    try:
        config.write_text(text.replace('"scaling_factor": 0.18215', '"scaling_factor": 0.5'))
        assert encoded(one, velocity_model, cache).encoded == 2, "another VAE"
    finally:
        config.write_text(text)


def test_a_damaged_cache_file_is_written_again(tmp_path: Path, base_model: Path, cache: Path):
    dataset = write_dataset(tmp_path)
    encoded(dataset, base_model, cache)
    kept = files(cache)
    first, second, _ = sorted(cache.glob("*/*"))
    first.write_bytes(kept[first.name][:50])
    second.write_bytes(b"")
    assert encoded(dataset, base_model, cache).encoded == 2
    assert files(cache) == kept


def test_a_changed_bit_anywhere_in_a_cache_file_is_noticed(tmp_path: Path):
    file = tmp_path / "latent.safetensors"
    latent = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(1))
    content = latents_module._content(latent)
    file.write_bytes(content)
    assert torch.equal(latents_module._read(file), latent)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert latents_module._read(file) is None, f"bit {bit}"


def test_a_latent_without_a_checksum_or_that_is_no_file_is_encoded_again(tmp_path: Path, base_model: Path, cache: Path):
    dataset = write_dataset(tmp_path)
    encoded(dataset, base_model, cache)
    kept = files(cache)
    first, second, third = sorted(cache.glob("*/*"))
    save_file(load_file(first), first)  # as older versions wrote it
    second.unlink()
    second.symlink_to(tmp_path / "nowhere")
    changed = bytearray(kept[third.name])
    changed[-3] ^= 0x10
    third.write_bytes(changed)
    assert encoded(dataset, base_model, cache).encoded == 3
    assert files(cache) == kept


def test_a_mirrored_latent_is_that_of_the_mirrored_image(tmp_path: Path, base_model: Path, cache: Path):
    dataset = write_dataset(tmp_path, {"a": "x"}, subset="flip_aug = true\nnum_repeats = 8")
    found = encoded(dataset, base_model, cache)
    assert len(files(cache)) == 2
    draws = [draw for batch in load_data(dataset, batch_size=1, multiple_of=8).epoch_batches(1, 1) for draw in batch]
    by_side = {draw.flipped: found.of((draw,))[0] for draw in draws}
    assert by_side.keys() == {True, False}
    vae = AutoencoderKL.from_pretrained(base_model / "vae", local_files_only=True).eval()
    for flipped, latent in by_side.items():
        expected = frozen_latent(vae, tmp_path / "images/a.png", flipped=flipped)
        torch.testing.assert_close(latent, expected, atol=1e-5, rtol=1e-5)


def test_unscaled_numbers_are_kept_so_that_a_file_says_what_the_vae_said(tmp_path: Path, base_model: Path, cache: Path):
    dataset = write_dataset(tmp_path, {"a": "x"})
    found = encoded(dataset, base_model, cache)
    (file,) = cache.glob("*/*")
    batch = load_data(dataset, batch_size=1, multiple_of=8).epoch_batches(1, 1)[0]
    torch.testing.assert_close(load_file(file)["latent"] * 0.18215, found.of(batch)[0])


@pytest.mark.parametrize(
    ("size", "fit", "left", "top"),
    [
        ((64, 64), Fit((64, 64), (64, 64)), 0, 0),
        ((128, 64), Fit((128, 64), (64, 64)), 32, 0),
        ((64, 99), Fit((64, 99), (64, 64)), 0, 17),
    ],
)
def test_the_crop_is_central(tmp_path: Path, size, fit: Fit, left: int, top: int):
    ramp = Image.new("RGB", size)
    ramp.putdata([(x, y, 0) for y in range(size[1]) for x in range(size[0])])
    ramp.save(tmp_path / "ramp.png")
    pixels = (read_pixels(image_of(tmp_path / "ramp.png", size, fit)) + 1) * 127.5
    assert pixels.shape == (3, 64, 64)
    assert pixels[:2, 0, 0].round().tolist() == [left, top]


def test_shrinking_averages_areas_and_transparency_is_dropped(tmp_path: Path):
    checks = Image.new("RGBA", (4, 4))
    checks.putdata([(255, 0, 0, 0) if (x + y) % 2 else (0, 0, 0, 255) for y in range(4) for x in range(4)])
    checks.save(tmp_path / "checks.png")
    pixels = read_pixels(image_of(tmp_path / "checks.png", (4, 4), Fit((2, 2), (2, 2))))
    assert pixels[0].abs().max() < 0.01 and torch.all(pixels[1:] == -1)


def test_an_image_that_breaks_off_is_named(tmp_path: Path, base_model: Path, cache: Path):
    dataset = write_dataset(tmp_path)
    file = tmp_path / "images/b.png"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"images/b\.png could not be decoded"):
        encoded(dataset, base_model, cache)
