"""A folder to train in: a base model, a data set, a config, and what comes out of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.config import TrainConfig, load_config, to_toml
from optimizer_daemon.lora_training.dataset import load_data
from optimizer_daemon.lora_training.stopping import StopWish
from optimizer_daemon.lora_training.train import train
from shared.errors import Stopped
from tests.optimizer_daemon.lora_training.pictures import write_dataset

SIGTERM = 15


class StopAt(StopWish):
    """A wish to stop that comes while the given batch is about to be trained, counted from 1 over the whole run."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self._left = batch

    def check(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Stopped(SIGTERM)


class Workshop:
    """One training's folder.

    Args:
        root: the folder.
        base: the base model.
        cache: latents; shared between workshops.
    """

    def __init__(self, root: Path, base: Path, cache: Path) -> None:
        self.root, self.base, self.cache = root, base, cache
        self.out = root / "out"
        self.state_file = self.out / "state/training_state.pt"

    def dataset(self, *args: Any, **kwargs: Any) -> Path:
        """Write the data set; see `write_dataset`."""
        return write_dataset(self.root, *args, **kwargs)

    def configure(self, **changes: Any) -> Path:
        """Write train_config.toml and return it; three images, batches of two and four epochs unless told otherwise."""
        if not (self.root / "dataset.toml").exists():
            self.dataset()
        values = {
            "pretrained_model_name_or_path": str(self.base),
            "dataset_config": str(self.root / "dataset.toml"),
            "output_dir": str(self.out),
            "output_name": "lora",
            "logging_dir": str(self.out / "logs"),
            "latent_cache_dir": str(self.cache),
            "learning_rate": 1e-2,
            "max_train_epochs": 4,
            "threads": 1,
            "device": "cpu",
            **changes,
        }
        path = self.root / "train_config.toml"
        path.write_text(to_toml(TrainConfig.model_validate(values)), encoding="utf-8")
        return path

    def train(self, wish: StopWish | None = None, **changes: Any) -> None:
        """Train in this process."""
        config = load_config(self.configure(**changes))
        base = inspect_base_model(config.pretrained_model_name_or_path)
        data = load_data(
            config.dataset_config,
            batch_size=config.train_batch_size,
            multiple_of=base.vae_factor,
            seed=config.seed,
            command=config.of_datasets,
        )
        config.output_dir.mkdir(exist_ok=True)
        train(config, data, base, wish or StopWish())

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("*.safetensors"))

    def weights(self, name: str = "lora.safetensors") -> dict[str, Tensor]:
        return load_file(self.out / name)

    def scalars(self) -> dict[str, dict[int, float]]:
        """Return what TensorBoard shows: tag -> step -> value."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.out / "logs/network_train"), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def header_of(path: Path) -> tuple[dict[str, Any], dict[str, str], bytes]:
    """Read a safetensors file without the library: (tensor entries, metadata, data section)."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    return header, metadata, content[8 + length :]
