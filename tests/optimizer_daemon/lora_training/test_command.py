"""The command itself: what it refuses, and how it says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optimizer_daemon.lora_training.pictures import write_dataset

ROOT = Path(__file__).parents[3]


def base_folder(folder: Path, **changes: object) -> Path:
    """The small files of a base model, enough to be recognised; a change names file and key as unet__in_channels."""
    documents: dict[str, dict[str, object]] = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": {"in_channels": 4, "cross_attention_dim": 768},
        "vae/config.json": {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "scaling_factor": 0.18215},
        "text_encoder/config.json": {"hidden_size": 768},
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
        "tokenizer/tokenizer_config.json": {},
    }
    for change, value in changes.items():
        part, _, key = change.partition("__")
        documents[{"index": "model_index.json", "unet": "unet/config.json"}[part]][key] = value
    for name, document in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(document))
    return folder


def write_config(folder: Path, **changes: object) -> Path:
    values: dict[str, object] = {
        "pretrained_model_name_or_path": "base",
        "dataset_config": "dataset.toml",
        "output_dir": "out",
        "output_name": "lora",
        "learning_rate": 1e-4,
        "max_train_epochs": 2,
        **changes,
    }
    path = folder / "train_config.toml"
    path.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None))
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimizer_daemon.lora_training", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"}
    )


def single_file(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    (folder / "base").write_bytes(b"weights")


def no_captions(folder: Path) -> None:
    (folder / "images/b.txt").unlink()


def no_images(folder: Path) -> None:
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()


def typo_in_dataset(folder: Path) -> None:
    path = folder / "dataset.toml"
    path.write_text(path.read_text().replace("batch_size", "batch_sise"))


def random_crops(folder: Path) -> None:
    with (folder / "dataset.toml").open("a") as file:
        file.write("  random_crop = true\n")


@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (
            lambda f: (f / "train_config.toml").unlink(),
            {},
            "train_config.toml: could not be read (No such file or direct",
        ),
        (lambda f: (f / "train_config.toml").write_text("= 1"), {}, "train_config.toml: not valid TOML"),
        (None, {"netwrok_dim": 8}, "netwrok_dim: there is no such key; did you mean 'network_dim'?"),
        (None, {"output_name": None}, "train_config.toml: output_name is missing"),
        (None, {"learning_rate": "high"}, "train_config.toml: learning_rate: 'high' will not do"),
        (
            lambda f: shutil.rmtree(f / "base"),
            {},
            "base is no diffusers folder (no model_index.json) and no file; correct the path",
        ),
        (
            single_file,
            {},
            "base' will not do; it is no .safetensors file, and a pickle (.ckpt, .pt, .bin) may run code",
        ),
        (
            lambda f: base_folder(f / "base", index___class_name="FluxPipeline"),
            {},
            "base is made for FluxPipeline; the native trainer trains StableDiffusionPipeline and StableDiffusionXLPip",
        ),
        (
            lambda f: base_folder(f / "base", index___class_name="StableDiffusionXLPipeline"),
            {},
            "base lacks text_encoder_2/config.json, tokenizer_2/tokenizer_config.json; copy the whole model",
        ),
        (
            None,
            {"text_encoder_lr": [1e-4, 1e-5]},
            "text_encoder_lr: [0.0001, 1e-05] will not do; a base model of family sd15 has 1 text encoder; give one",
        ),
        (lambda f: base_folder(f / "base", unet__in_channels=9), {}, "takes 9 channels, its VAE makes 4; inpainting"),
        (
            lambda f: base_folder(f / "base", unet__cross_attention_dim=1024),
            {},
            "expects text of width 1024, its text enc",
        ),
        (
            lambda f: shutil.rmtree(f / "base/tokenizer"),
            {},
            "base lacks tokenizer/tokenizer_config.json; copy the whole",
        ),
        (lambda f: (f / "base/vae/config.json").write_text("{"), {}, "vae/config.json: could not be read"),
        (None, {"dataset_config": "missing.toml"}, "missing.toml: could not be read (No such file or directory)"),
        (typo_in_dataset, {}, "datasets[0].batch_sise: there is no such key; did you mean 'batch_size'?"),
        (
            random_crops,
            {},
            "datasets[0].subsets[0].random_crop: True will not do; the native trainer does",
        ),
        (no_captions, {}, "images/b.png has no caption: b.txt is missing"),
        (no_images, {}, "image_dir: "),
        (lambda f: (f / "images/a.png").write_bytes(b"?"), {}, "images/a.png is no readable image"),
    ],
    ids=[
        "no config",
        "a broken config",
        "a misspelt setting",
        "a missing setting",
        "a value of another kind",
        "no base model",
        "a single-file base model",
        "a base model of another family",
        "half an SDXL base model",
        "two rates for one text encoder",
        "an inpainting model",
        "parts of different models",
        "half a base model",
        "a broken file in the base model",
        "no data set",
        "a misspelt key in the data set",
        "a feature we lack",
        "an image without caption",
        "a folder without images",
        "a file that is no image",
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, prepare, changes, message: str):
    base_folder(tmp_path / "base")
    write_dataset(tmp_path)
    config = write_config(tmp_path, **changes)
    if prepare is not None:
        prepare(tmp_path)
    done = run("--config", config)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_a_lack_of_disk(tmp_path: Path):
    base_folder(tmp_path / "base")
    write_dataset(tmp_path)
    (tmp_path / "out").write_text("in the way")
    done = run("--config", write_config(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "out: could not be written" in done.stderr


def test_help_names_the_flags():
    done = run("--help")
    assert done.returncode == 0
    assert "--config" in done.stdout and "--resume" in done.stdout
