"""All that one of sd-scripts' real trainings needs, small enough to take seconds: checkout, base model, pictures."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.clip_tokenizers import kohya_tokenizer_folder
from tests.kohya.narrow_checkout import make_checkout
from tests.kohya.narrow_model import save_narrow_model
from tests.optimizer_daemon.lora_training.pictures import write_images

CAPTIONS = {"a": "a red ball, soft light", "b": "a blue cube, soft light", "c": "a green cone, soft light"}
_QUIET = {"PYTHONUNBUFFERED": "1", "COLUMNS": "240", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class NarrowWorld:
    """Where everything lies.

    Args:
        python: the Python of sd-scripts.
        checkout: of sd-scripts, narrowed; see narrow_checkout.py.
        base: the base model, a diffusers folder.
        tokenizers: what sd-scripts takes as tokenizer_cache_dir.
        dataset: kohya's dataset TOML: three pictures of 64 px in batches of two.
    """

    python: str
    checkout: Path
    base: Path
    tokenizers: Path
    dataset: Path

    def single_file(self, file: Path) -> Path:
        """Write the base model as one file; return it."""
        program = Path(__file__).with_name("narrow_single_file.py")
        done = self.run([str(program), str(self.base), str(file)])
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return file

    def train(self, output_dir: Path, **changes: Any) -> subprocess.CompletedProcess[bytes]:
        """Run train_network.py to its end; four epochs of two steps, saved every second epoch, unless told otherwise.

        Raises:
            AssertionError: it failed.
        """
        output_dir.mkdir(parents=True, exist_ok=True)
        config = output_dir / "train_config.toml"
        values = {**self.settings(output_dir), **changes}
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]  # TOML writes these as JSON does
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        done = self.run(["train_network.py", "--config_file", str(config)])
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return done

    def settings(self, output_dir: Path) -> dict[str, Any]:
        """Return the settings of `train`, under kohya's names."""
        return {**training_settings(self.base, self.dataset, output_dir), "tokenizer_cache_dir": str(self.tokenizers)}

    def run(self, arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
        """Run Python in the checkout, with the environment that a trainer gives it."""
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # ours would hide its pins
        env |= _QUIET | {"PYTHONPATH": str(self.checkout)}
        command = [self.python, *arguments]
        return subprocess.run(command, cwd=self.checkout, env=env, capture_output=True, timeout=240, check=False)


def training_settings(base: Path, dataset: Path, output_dir: Path) -> dict[str, Any]:
    """Return a training of four epochs, saved every second."""
    return {
        "pretrained_model_name_or_path": str(base),
        "dataset_config": str(dataset),
        "output_dir": str(output_dir),
        "output_name": "lora_trial_1",
        "network_module": "networks.lora",
        "network_dim": 4,
        "network_alpha": 2.0,
        "learning_rate": 1e-3,
        "unet_lr": 1e-3,
        "text_encoder_lr": 1e-4,
        "optimizer_type": "AdamW",
        "lr_scheduler": "cosine",
        "max_train_epochs": 4,
        "save_every_n_epochs": 2,
        "save_model_as": "safetensors",
        "save_precision": "fp16",
        "mixed_precision": "no",
        "clip_skip": 2,
        "min_snr_gamma": 5.0,
        "noise_offset": 0.05,
        "seed": 42,
        "cache_latents": True,
        "max_data_loader_n_workers": 0,
    }


def write_pictures(root: Path) -> Path:
    """Write three pictures of 64 px with captions, in batches of two; return their dataset TOML."""
    images = write_images(root / "images", CAPTIONS)
    dataset = root / "dataset.toml"
    dataset.write_text(
        "[general]\ncaption_extension = '.txt'\n\n[[datasets]]\nresolution = 64\nbatch_size = 2\n\n"
        # Absolute: sd-scripts counts a relative one from wherever it is started.
        f"  [[datasets.subsets]]\n  image_dir = '{images}'\n"
    )
    return dataset


def make_world(root: Path, sd_scripts: Path, python: str) -> NarrowWorld:
    """Make everything in `root`.

    Args:
        root: an absolute path; made where needed.
        sd_scripts: the real checkout.
        python: its Python.
    """
    return NarrowWorld(
        python,
        make_checkout(sd_scripts, root / "sd-scripts"),
        save_narrow_model(root / "narrow_base"),
        kohya_tokenizer_folder(root / "tokenizers"),
        write_pictures(root),
    )
