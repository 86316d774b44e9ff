"""What a resumed training must share with the one that saved its state."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.dataset import TrainingData
from optimizer_daemon.lora_training.metadata import model_hashes
from optimizer_daemon.lora_training.models import Hardware
from shared.held_out import file_digest
from shared.model_folders import digest_model
from shared.single_file import config_folder

_SETTING = "pretrained_model_name_or_path"


def identity_of(config: TrainConfig, data: TrainingData, base: BaseModel, hardware: Hardware) -> dict[str, Any]:
    """Return the settings and the contents that decide the weights, by name; files may lie anywhere.

    Raises:
        SettingsError: a file of them cannot be read.
    """
    start = config.network_weights
    return {
        **config.weight_deciding(),
        "base model": base_model_digest(base.folder),
        "network_weights": None if start is None else file_digest(start, "network_weights"),
        "training data": data.digest(),
        "mixed precision": hardware.precision,
    }


def base_model_digest(model: Path) -> str:
    """Return the identity of a base model's contents; its gigabytes are read once for each state of its files.

    Raises:
        SettingsError: a file cannot be read.
    """
    own = config_folder(model) if model.is_file() else model
    files = sorted(file for file in own.rglob("*") if file.is_file())
    looks = [(str(file), look.st_size, look.st_mtime_ns, look.st_ino) for file in files for look in [file.stat()]]
    if not model.is_file():
        return _folder_digest(model, *looks)
    digest = hashlib.sha256(model_hashes(model)["ss_new_sd_model_hash"].encode())
    for file in files:
        digest.update(f"\n{file.relative_to(own).as_posix()} {file_digest(file, _SETTING)}".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _folder_digest(model: Path, *stamp: object) -> str:
    """`stamp` tells the states of the folder apart."""
    return digest_model(model, setting=_SETTING)
