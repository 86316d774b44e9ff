"""The trainers that are compared, each started as its users start it, with the same model, pictures and settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.training.watching import Training
from benchmarks.training.world import World
from optimizer_daemon.lora_training.config import TrainConfig, to_toml
from optimizer_daemon.lora_training.dataset_config import BatchShape
from optimizer_daemon.trainers.native import preload_of
from shared.preloaded import Preloaded
from shared.process import ProcessIdentity
from shared.supervised import start_supervised

ROOT = Path(__file__).resolve().parents[2]
RANK, ALPHA, RATE, SEED = 4, 2.0, 1e-4, 42
EPOCHS = 1000  # nobody comes to the end


@dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        size_px: of the square pictures.
        text_encoder: it is trained beside the UNet.
        batch_size: pictures a step.
        threads: of the CPU.
        device: cpu or cuda.
        precision: mixed precision: no, fp16 or bf16.
    """

    size_px: int
    text_encoder: bool
    batch_size: int
    threads: int
    device: str
    precision: str

    def __str__(self) -> str:
        return f"{self.size_px} px, UNet{' and text encoder' if self.text_encoder else ' only'}"


class Contestant(Protocol):
    """One trainer."""

    name: str

    def takes(self, task: Task) -> bool:
        """Whether it can train that at all."""
        ...

    def start(self, task: Task, world: World, folder: Path) -> Training:
        """Begin to train in an empty folder."""
        ...


class Native:
    """Our trainer as the optimizer daemon starts it from the second trial on: forked from the preloaded process."""

    name = "native"

    def __init__(self, task: Task, world: World) -> None:
        shape = BatchShape(task.batch_size, task.size_px, task.size_px) if task.device == "cpu" else None
        self.server = Preloaded(preload_of(world.base_model, _environment(task), shape))

    def takes(self, task: Task) -> bool:
        return True

    def start(self, task: Task, world: World, folder: Path) -> Training:
        config = TrainConfig.model_validate(
            {
                "pretrained_model_name_or_path": str(world.base_model),
                "dataset_config": str(world.dataset(task.size_px, task.batch_size)),
                "output_dir": str(folder),
                "output_name": "lora",
                "logging_dir": str(folder / "logs"),
                "latent_cache_dir": str(world.cache / "latents"),
                "network_dim": RANK,
                "network_alpha": ALPHA,
                "learning_rate": RATE,
                "text_encoder_lr": RATE if task.text_encoder else 0.0,
                "max_train_epochs": EPOCHS,
                "seed": SEED,
                "threads": task.threads,
                "device": task.device,
                "mixed_precision": task.precision,
            }
        )
        (folder / "train_config.toml").write_text(to_toml(config), encoding="utf-8")
        argv = [sys.executable, "-m", "optimizer_daemon.lora_training", "--config", str(folder / "train_config.toml")]
        training = Training(folder / "training.log")
        process = start_supervised(argv, directory=folder, cwd=ROOT, env=_environment(task), preloaded=self.server)
        assert process.supervisor is not None
        training.process = _command_of(process.supervisor)
        training.end = lambda: process.stop(term_timeout_s=0.0, kill_timeout_s=10.0)
        return training


class SdScripts:
    """kohya's train_network.py, in its own Python, with its latents cached on disk by an earlier start."""

    name = "sd-scripts"

    def __init__(self, directory: Path, python: str) -> None:
        self._directory, self._python = directory, python

    def takes(self, task: Task) -> bool:
        return True

    def start(self, task: Task, world: World, folder: Path) -> Training:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": str(world.base_model),
            "tokenizer_cache_dir": str(world.tokenizers),
            "dataset_config": str(world.dataset(task.size_px, task.batch_size)),
            "output_dir": str(folder),
            "output_name": "lora",
            "logging_dir": str(folder / "logs"),
            "network_module": "networks.lora",
            "network_dim": RANK,
            "network_alpha": ALPHA,
            "network_train_unet_only": not task.text_encoder,
            "learning_rate": RATE,
            "optimizer_type": "AdamW",
            "lr_scheduler": "constant",
            "max_train_epochs": EPOCHS,
            "save_model_as": "safetensors",
            "mixed_precision": task.precision,
            "seed": SEED,
            "sdpa": True,
            "cache_latents": True,
            "cache_latents_to_disk": True,
            "max_data_loader_n_workers": 0,
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        (folder / "run.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        argv = [self._python, "train_network.py", "--config_file", str(folder / "run.toml")]
        return _started(argv, self._directory, _environment(task), folder)


class DiffusersExample:
    """diffusers' examples/text_to_image/train_text_to_image_lora.py, which trains the UNet alone."""

    name = "diffusers example"

    def __init__(self, directory: Path, python: str) -> None:
        self._directory, self._python = directory / "examples" / "text_to_image", python

    def takes(self, task: Task) -> bool:
        return not task.text_encoder

    def start(self, task: Task, world: World, folder: Path) -> Training:
        options = {
            "pretrained_model_name_or_path": world.base_model,
            "train_data_dir": world.pictures(task.size_px),
            "cache_dir": world.cache / "datasets",
            "caption_column": "text",
            "resolution": task.size_px,
            "train_batch_size": task.batch_size,
            "max_train_steps": 100_000,
            "checkpointing_steps": 100_000,
            "learning_rate": RATE,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "rank": RANK,
            "mixed_precision": task.precision,
            "seed": SEED,
            "output_dir": folder,
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        env = {**_environment(task), "ACCELERATE_USE_CPU": "true" if task.device == "cpu" else "false"}
        env["HF_DATASETS_OFFLINE"] = "1"
        argv = [self._python, "train_text_to_image_lora.py", *words]
        return _started(argv, self._directory, env, folder)


def contestants(task: Task, world: World) -> list[Contestant]:
    """Return ours, and the others where the environment names them."""
    found: list[Contestant] = [Native(task, world)]
    if directory := os.environ.get("SD_SCRIPTS_DIR"):
        python = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
        found.append(SdScripts(Path(directory).absolute(), python))
    if directory := os.environ.get("DIFFUSERS_DIR"):
        python = os.environ.get("DIFFUSERS_PYTHON", sys.executable)
        found.append(DiffusersExample(Path(directory).absolute(), python))
    return found


def _command_of(supervisor: ProcessIdentity) -> ProcessIdentity:
    """Wait for a supervisor's command, which is its only child."""
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
    while not (pids := children.read_text().split()):
        time.sleep(0.001)
    command = ProcessIdentity.of(int(pids[0]))
    assert command is not None, "nobody has waited for it yet"
    return command


def _environment(task: Task) -> dict[str, str]:
    threads = str(task.threads)
    ours = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "240",
    }
    return {**os.environ, **ours} | ({"CUDA_VISIBLE_DEVICES": ""} if task.device == "cpu" else {})


def _started(argv: list[str], directory: Path, env: Mapping[str, str], folder: Path) -> Training:
    training = Training(folder / "training.log")
    # The other's libraries must not be found among ours.
    variables = {name: value for name, value in env.items() if name != "PYTHONPATH" or argv[0] == sys.executable}
    with training.log.open("wb") as log:
        process = subprocess.Popen(argv, cwd=directory, env=variables, stdout=log, stderr=log, start_new_session=True)

    def end() -> None:
        process.kill()
        process.wait()

    training.process, training.end = process, end
    return training
