"""Checkpoints as sd-scripts writes them: names, tensors, metadata and hashes."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.config import SavePrecision, TrainConfig
from optimizer_daemon.lora_training.dataset import ImageSet, TrainingData
from optimizer_daemon.lora_training.lora import LoraNetwork
from shared.errors import UserError
from shared.files import write_bytes

_DTYPES: Mapping[SavePrecision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}


@dataclass(frozen=True)
class Facts:
    """What the metadata tells beside the settings.

    Args:
        optimizer: class and arguments that ran.
        precision: the mixed precision that ran.
        predicts_velocity: the objective that ran.
        total_steps: optimizer steps of the whole training.
    """

    optimizer: str
    precision: str
    predicts_velocity: bool
    total_steps: int


def checkpoint_path(config: TrainConfig, epoch: int) -> Path:
    """Return where the weights after `epoch` go; only the last epoch's have no number."""
    number = "" if epoch == config.max_train_epochs else f"-{epoch:06d}"
    return config.output_dir / f"{config.output_name}{number}.safetensors"


def is_due(config: TrainConfig, epoch: int) -> bool:
    """Whether weights are saved after `epoch`, as an intermediate or as the final checkpoint."""
    every = config.save_every_n_epochs
    return epoch == config.max_train_epochs or (every is not None and epoch % every == 0)


def training_metadata(config: TrainConfig, data: TrainingData, base: BaseModel, facts: Facts) -> dict[str, str]:
    """Return the metadata of all checkpoints of a training; `save_checkpoint` adds what differs between them."""
    rates = {
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.effective_unet_lr,
        "ss_text_encoder_lr": config.effective_text_encoder_lr,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_optimizer": facts.optimizer,
        "ss_max_grad_norm": config.max_grad_norm,
    }
    network = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": config.network_dim,
        "ss_network_alpha": config.network_alpha,
        "ss_network_dropout": config.network_dropout,
    }
    model = {
        "ss_base_model_version": base.version + ("_v" if facts.predicts_velocity else ""),
        "ss_v2": base.version == "sd_v2",
        "ss_sd_model_name": base.folder.name,
        "ss_clip_skip": config.clip_skip,
        "ss_max_token_length": None,
    }
    loop = {
        "ss_output_name": config.output_name,
        "ss_session_id": secrets.randbelow(2**32),
        "ss_training_started_at": time.time(),
        "ss_training_comment": "native trainer",
        "ss_seed": config.seed,
        "ss_num_epochs": config.max_train_epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_num_batches_per_epoch": data.batches_per_epoch,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": facts.precision,
        "ss_full_fp16": False,
        "ss_cache_latents": True,
    }
    objective = {
        "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_noise_offset": config.noise_offset,
        "ss_loss_type": "l2",
        "ss_prior_loss_weight": 1.0,
        "ss_zero_terminal_snr": False,
    }
    images = {
        "ss_num_train_images": data.num_train_images,
        "ss_num_validation_images": 0,
        "ss_num_reg_images": 0,
        "ss_datasets": json.dumps([_dataset_facts(images) for images in data.sets]),
        "ss_dataset_dirs": json.dumps(_folders(data)),
        "ss_tag_frequency": json.dumps(data.tag_frequency()),
    }
    return {key: str(value) for key, value in {**rates, **network, **model, **loop, **objective, **images}.items()}


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


def _dataset_facts(images: ImageSet) -> dict[str, object]:
    dataset = images.plan.dataset
    buckets = {
        str(index): {"resolution": size, "count": len(members)}
        for index, (size, members) in enumerate(images.buckets.items())
    }
    frequency = TrainingData(Path(), (images,)).tag_frequency()
    return {
        "is_dreambooth": True,
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(image.subset.num_repeats for image in images.images),
        "num_reg_images": 0,
        "resolution": dataset.resolution,
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": dataset.min_bucket_reso if dataset.enable_bucket else None,
        "max_bucket_reso": dataset.max_bucket_reso if dataset.enable_bucket else None,
        "tag_frequency": frequency,
        "bucket_info": {"buckets": buckets} if dataset.enable_bucket else None,
        "subsets": [
            {
                **subset.model_dump(mode="json", exclude={"caption_extension", "caption_separator"}),
                "image_dir": Path(subset.image_dir).name,
                "img_count": sum(image.subset is subset for image in images.images),
                "is_reg": False,
                "color_aug": False,
                "random_crop": False,
            }
            for subset in images.plan.subsets
        ],
    }


def _folders(data: TrainingData) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for images in data.sets:
        for subset in images.plan.subsets:
            name, count = Path(subset.image_dir).name, 2
            while name in found:
                name, count = f"{Path(subset.image_dir).name} ({count})", count + 1
            found[name] = {
                "n_repeats": subset.num_repeats,
                "img_count": sum(image.subset is subset for image in images.images),
            }
    return found
