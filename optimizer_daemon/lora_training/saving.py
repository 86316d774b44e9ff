"""Checkpoints as sd-scripts writes them: names, tensors, metadata and hashes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from optimizer_daemon.lora_training.config import SavePrecision, TrainConfig
from optimizer_daemon.lora_training.lora import LoraNetwork
from shared.errors import UserError
from shared.files import write_bytes

_DTYPES: Mapping[SavePrecision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}


def checkpoint_path(config: TrainConfig, epoch: int) -> Path:
    """Return where the weights after `epoch` go; only the last epoch's have no number."""
    number = "" if epoch == config.max_train_epochs else f"-{epoch:06d}"
    return config.output_dir / f"{config.output_name}{number}.safetensors"


def is_due(config: TrainConfig, epoch: int) -> bool:
    """Whether weights are saved after `epoch`, as an intermediate or as the final checkpoint."""
    every = config.save_every_n_epochs
    return epoch == config.max_train_epochs or (every is not None and epoch % every == 0)


def save_checkpoint(
    path: Path, network: LoraNetwork, metadata: Mapping[str, str], *, epoch: int, step: int, precision: SavePrecision
) -> None:
    """Write the weights whole and durably, in place of any file of that name.

    Raises:
        UserError: a weight is not finite, so the checkpoint would be worthless.
        DiskError: the file could not be written; an older one of that name still stands.
    """
    tensors = {
        name: tensor.detach().to("cpu", _DTYPES[precision]).contiguous()
        for name, tensor in network.state_dict().items()
    }
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(tensors)} weights are not finite in {precision} after epoch {epoch}, first "
            f"{broken[0]}; lower the learning rates"
        )
    own = {
        **metadata,
        "ss_epoch": str(epoch),
        "ss_steps": str(step),
        "ss_training_finished_at": str(time.time()),
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    write_bytes(path, to_bytes(tensors, metadata=own | hashes(tensors, own)))


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return sshs_model_hash and sshs_legacy_hash, by which model browsers know a file whose metadata was edited.

    The first is the SHA-256 of the data section; the second, of older browsers, of 64 KiB at 1 MiB into the file as it
    is with the ss_ metadata alone.
    """
    content = to_bytes(dict(tensors), metadata={key: text for key, text in metadata.items() if key.startswith("ss_")})
    data = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
