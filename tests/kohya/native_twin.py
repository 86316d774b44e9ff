"""The native trainer on the settings of a training by sd-scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimizer_daemon.lora_training.__main__ import main
from optimizer_daemon.lora_training.config import TrainConfig, to_toml

OF_ITS_RUN = frozenset(
    {
        "ss_session_id",
        "ss_training_started_at",
        "ss_training_finished_at",
        "sshs_model_hash",
        "modelspec.date",
        "modelspec.implementation_version",
        "modelspec.resolution",  # theirs says 512x512 unless the resolution is on the command line
    }
)
"""Keys of the metadata whose values differ between the two."""

_NOT_OURS = ("tokenizer_cache_dir", "network_module", "save_model_as", "cache_latents", "max_data_loader_n_workers")


def train_native(settings: Mapping[str, Any], folder: Path) -> None:
    """Train in this process; what only sd-scripts has to be told is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in settings.items() if name not in _NOT_OURS}
    machine = {"device": "cpu", "threads": 1, "latent_cache_dir": str(folder / "latents")}
    config = folder / "train_config.toml"
    config.write_text(to_toml(TrainConfig.model_validate(values | machine)), encoding="utf-8")
    assert main(["--config", str(config)]) == 0
