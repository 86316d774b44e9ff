"""The base model's frozen networks, loaded once for all trainings that are forked from one process.

Nothing writes to frozen weights, so a fork shares their memory with the process that loaded them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from optimizer_daemon.lora_training.base_model import BaseModel, inspect_base_model
from optimizer_daemon.lora_training.dataset_config import BatchShape
from optimizer_daemon.lora_training.identity import base_model_digest
from optimizer_daemon.lora_training.metadata import model_hashes
from optimizer_daemon.lora_training.models import Hardware, load_text_encoders, load_unet
from optimizer_daemon.lora_training.packed import may_pack, pack, packed_bytes
from shared.errors import CheckpointError
from shared.safetensors_file import MAX_MODEL_BYTES, read_header
from shared.single_file import config_folder

_MOST_OF_MEMORY = 0.5  # of what is available
_FLOAT32 = 4  # bytes
_TOKENS = 77  # of a text, as CLIP reads it
_VAE = "first_stage_model."  # in a single file; it is not kept

_Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class _Kept:
    base: BaseModel
    stamp: _Stamp
    packed_for: BatchShape | None
    unet: nn.Module
    encoders: list[nn.Module]


_kept: list[_Kept] = []  # at most one
_why_not: list[str] = []  # at most one: why nothing is kept


def keep_networks(what: str) -> None:
    """Load a base model's UNet and text encoders to keep them, in float32 on the CPU, where memory allows.

    Starts no thread and touches no GPU, so that this process may be forked.

    Args:
        what: a JSON object: base_model, a path; batch_shape, that of the trainings on this CPU, null where they have
            several or run on a GPU.
    Raises:
        UserError: the model cannot be loaded.
    """
    torch.set_num_threads(1)  # OpenMP's threads would be gone in a fork, and waited for
    asked = json.loads(what)
    base = inspect_base_model(Path(asked["base_model"]))
    model_hashes(base.folder)  # remembered for the metadata of all trainings
    base_model_digest(base.folder)  # and this for their states
    stamp = _stamp(base)
    hardware = Hardware(torch.device("cpu"), torch.float32)
    shape = _packed_for(base, hardware, asked["batch_shape"] and BatchShape(*asked["batch_shape"]))
    size, most = _float32_bytes(base), int(_MOST_OF_MEMORY * psutil.virtual_memory().available)
    size = packed_bytes(size) if shape else size
    if size > most:
        _why_not[:] = [f"in float32 they take {size / 2**30:.1f} GiB, of memory at most {most / 2**30:.1f} GiB is used"]
        return
    _why_not.clear()
    _kept[:] = [_Kept(base, stamp, shape, *_loaded(base, hardware, shape))]


def frozen_networks(
    base: BaseModel, hardware: Hardware, batch_shape: BatchShape | None = None
) -> tuple[nn.Module, list[nn.Module]]:
    """Return the frozen UNet and text encoders on the training's hardware: those kept, or loaded ones.

    A model whose files have changed since is loaded. A forked training says which it was.

    Args:
        base: the model.
        hardware: where they are used.
        batch_shape: of all batches, for which a CPU's weights are packed; None where there are several.
    """
    shape = _packed_for(base, hardware, batch_shape)
    for kept in _kept:
        if kept.base == base and kept.stamp == _stamp(base) and kept.packed_for == shape:
            unet, *encoders = (
                nn.Module.to(module, hardware.device, hardware.dtype) for module in (kept.unet, *kept.encoders)
            )
            print("base model: as loaded by the preloaded process", flush=True)
            return unet, encoders
    for why in _why_not or ["its files or the size of the pictures have changed since" for _ in _kept]:
        print(f"base model: not kept by the preloaded process, {why}; loading it", flush=True)
    return _loaded(base, hardware, shape)


def _packed_for(base: BaseModel, hardware: Hardware, shape: BatchShape | None) -> BatchShape | None:
    """Return the shape of the batches that the UNet's weights are packed for; None where they are not."""
    return shape if shape is not None and may_pack(_float32_bytes(base), hardware.device) else None


def _loaded(base: BaseModel, hardware: Hardware, shape: BatchShape | None) -> tuple[nn.Module, list[nn.Module]]:
    unet, encoders = load_unet(base, hardware), load_text_encoders(base, hardware)
    if shape is not None:
        pack(unet, lambda: _show(unet, base, shape))
    return unet, encoders


def _show(unet: Any, base: BaseModel, shape: BatchShape) -> None:
    """Call the UNet as a training does, with nothing."""
    pictures, height, width = shape[0], shape[1] // base.vae_factor, shape[2] // base.vae_factor
    config = unet.config
    beside = None
    if base.family == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        beside = {"text_embeds": torch.zeros(pictures, pooled), "time_ids": torch.zeros(pictures, 6)}
    unet(
        torch.zeros(pictures, config.in_channels, height, width),
        torch.zeros(pictures, dtype=torch.long),
        torch.zeros(pictures, _TOKENS, base.text_width),
        added_cond_kwargs=beside,
    )


def _stamp(base: BaseModel) -> _Stamp:
    """Return what tells one state of the networks' files from another without reading them."""
    if base.folder.is_file():
        files = [base.folder, *sorted(config_folder(base.folder).rglob("*.json"))]
    else:
        folders = [base.folder / part for part in ("unet", *base.text_encoders)]
        files = sorted(file for folder in folders for file in folder.iterdir() if file.is_file())
    looks = [(str(file), file.stat()) for file in files]
    return tuple((name, look.st_size, look.st_mtime_ns, look.st_ino) for name, look in looks)


def _float32_bytes(base: BaseModel) -> int:
    """Return what the networks take in float32, by the headers of their files; of other formats as if of 16 bits."""
    if base.folder.is_file():
        files = [base.folder]
    else:
        folders = [base.folder / part for part in ("unet", *base.text_encoders)]
        # One with a further dot is a variant, such as .fp16.safetensors, that is not loaded.
        files = [
            file
            for folder in folders
            for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
            if file.name.count(".") == 1
        ]
    return sum(map(_float32_bytes_of, files))


def _float32_bytes_of(file: Path) -> int:
    real = file.resolve()  # a download cache links to the content
    if file.suffix != ".safetensors":
        return 2 * real.stat().st_size
    try:
        tensors = read_header(real, real.parent, max_bytes=MAX_MODEL_BYTES).tensors
    except CheckpointError:
        return 2 * real.stat().st_size  # the loader says what is wrong with it
    return sum(_FLOAT32 * math.prod(tensor.shape) for name, tensor in tensors.items() if not name.startswith(_VAE))
