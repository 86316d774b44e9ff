"""What a checkpoint's metadata tells of its training, under the keys and in the form of sd-scripts.

Model browsers, metadata editors and web UIs read these: ss_* are the training's, modelspec.* Stability AI's ModelSpec
1.0.1. Every value is text, None is "None".
"""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata as distribution
from pathlib import Path

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.buckets import Size
from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.dataset import ImageSet, TrainingData
from optimizer_daemon.lora_training.dataset_config import Subset

SETTINGS: Mapping[str, object] = {
    "adaptive_noise_scale": None,
    "caption_dropout_every_n_epochs": 0,  # of data sets that say nothing, as are the next two
    "caption_dropout_rate": 0.0,
    "caption_tag_dropout_rate": 0.0,
    "clip_skip": None,
    "face_crop_aug_range": None,
    "fp8_base": False,
    "fp8_base_unet": False,
    "full_fp16": False,
    "gradient_accumulation_steps": 1,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "snr",
    "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False,
    "learning_rate": None,
    "loss_type": "l2",
    "lowram": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "max_grad_norm": 1.0,
    "max_token_length": None,
    "max_validation_steps": None,
    "min_snr_gamma": None,
    "multires_noise_discount": 0.3,
    "multires_noise_iterations": None,
    "network_alpha": 1.0,
    "network_dim": 4,
    "network_dropout": None,
    "noise_offset": None,
    "noise_offset_random_strength": False,
    "output_name": None,
    "prior_loss_weight": 1.0,
    "resize_interpolation": None,
    "scale_weight_norms": None,
    "seed": None,
    "text_encoder_lr": None,
    "training_comment": None,
    "unet_lr": None,
    "validate_every_n_epochs": None,
    "validate_every_n_steps": None,
    "validation_seed": None,
    "validation_split": 0.0,
    "zero_terminal_snr": False,
}
"""Settings that sd-scripts records as ss_<name> -> what it records of a training that does not use the setting.

Those that a training here has are recorded as they are; the rest are none of this trainer's and so without effect.
"""
_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v1_v": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
}
_SGM = "https://github.com/Stability-AI/generative-models"  # whose names the modules of an SDXL LoRA have
_OLD_HASH_AT, _OLD_HASH_LENGTH = 0x100000, 0x10000
_FOLDER = "IsADirectory"  # what sd-scripts writes for the hash of a model that is a folder


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


def training_metadata(config: TrainConfig, data: TrainingData, base: BaseModel, facts: Facts) -> dict[str, str]:
    """Return the metadata of all checkpoints of a training; `save_checkpoint` adds what differs between them."""
    settings = {
        f"ss_{name}": without if (value := getattr(config, name, None)) is None else value
        for name, without in SETTINGS.items()
    }
    # sd-scripts has one name for SDXL, whatever it predicts
    version = base.version + ("_v" if facts.predicts_velocity and base.family == "sd15" else "")
    loop = {
        "ss_session_id": secrets.randbelow(2**32),
        "ss_training_started_at": time.time(),
        "ss_optimizer": facts.optimizer,
        "ss_debiased_estimation": config.debiased_estimation_loss,
        "ss_mixed_precision": facts.precision,
        "ss_num_epochs": config.max_train_epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_num_batches_per_epoch": data.batches_per_epoch,
        "ss_cache_latents": True,
        "ss_network_module": "networks.lora",
    }
    if args := config.network_args.model_dump(exclude_none=True):
        texts = {name: str(value) for name, value in args.items()}
        loop["ss_network_args"] = json.dumps({**texts, "dropout": config.network_dropout})
    model = {
        "ss_base_model_version": version,
        "ss_v2": base.version == "sd_v2",
        "ss_sd_model_name": base.folder.name,
        **model_hashes(base.folder),
    }
    images = {
        "ss_num_train_images": data.num_train_images,
        "ss_num_validation_images": len(data.validation_images),
        "ss_num_reg_images": data.num_reg_images,
        "ss_datasets": json.dumps([_dataset_facts(images) for images in data.sets]),
        "ss_dataset_dirs": json.dumps(_folders(data)),
        "ss_tag_frequency": json.dumps(data.tag_frequency()),
    }
    known = {**settings, **loop, **model, **images}
    return {key: str(value) for key, value in known.items()} | _model_spec(config, data, version, facts)


def _model_spec(config: TrainConfig, data: TrainingData, version: str, facts: Facts) -> dict[str, str]:
    width, height = max((images.plan.dataset.resolution for images in data.sets), key=lambda size: size[0] * size[1])
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{_ARCHITECTURES[version]}/lora",
        "implementation": _SGM if version.startswith("sdxl") else "diffusers",
        "implementation_version": _program(),
        "title": config.output_name,
        "resolution": f"{width}x{height}",  # sd-scripts says 512x512 where the data set's TOML sets it
        "prediction_type": "v" if facts.predicts_velocity else "epsilon",
    }
    if config.clip_skip is not None:
        spec["encoder_layer"] = str(config.clip_skip)
    if config.min_timestep is not None or config.max_timestep is not None:
        lowest, end = config.min_timestep or 0, config.max_timestep if config.max_timestep is not None else 1000
        spec["timestep_range"] = f"{lowest},{end}"
    return {f"modelspec.{key}": text for key, text in spec.items()}


def _program() -> str:
    try:
        return f"lora-tuner/{distribution.version('lora-tuner')}"
    except distribution.PackageNotFoundError:  # run from its sources, by a Python of its own
        return "lora-tuner/unknown"


def model_hashes(base: Path) -> dict[str, str]:
    """Return the hashes by which web UIs know the base model: of 64 KiB at 1 MiB, and of the whole file."""
    if base.is_dir():
        return {"ss_sd_model_hash": _FOLDER, "ss_new_sd_model_hash": _FOLDER}
    look = base.stat()
    old, whole = _file_hashes(base, look.st_size, look.st_mtime_ns, look.st_ino)
    return {"ss_sd_model_hash": old, "ss_new_sd_model_hash": whole}


@functools.lru_cache(maxsize=1)
def _file_hashes(base: Path, *stamp: int) -> tuple[str, str]:
    """Read a file of gigabytes once; `stamp` tells its states apart."""
    with base.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(_OLD_HASH_AT)
        return hashlib.sha256(file.read(_OLD_HASH_LENGTH)).hexdigest()[:8], whole


def _dataset_facts(images: ImageSet) -> dict[str, object]:
    dataset = images.plan.dataset
    return {
        "is_dreambooth": True,
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": images.num_train_images,
        "num_reg_images": images.num_reg_images,
        "resolution": dataset.resolution,
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": dataset.min_bucket_reso if dataset.enable_bucket else None,
        "max_bucket_reso": dataset.max_bucket_reso if dataset.enable_bucket else None,
        "tag_frequency": TrainingData(Path(), (images,)).tag_frequency(),
        "bucket_info": _bucket_facts(images) if dataset.enable_bucket else None,
        "resize_interpolation": None,
        "subsets": [_subset_facts(subset, images.count(subset)) for subset in images.plan.subsets],
    }


def _bucket_facts(images: ImageSet) -> dict[str, object]:
    buckets = {
        str(index): {"resolution": size, "count": len(members)}
        for index, (size, members) in enumerate(images.buckets.items())
    }
    errors = [abs(_aspect(image.fit.bucket) - _aspect(image.size)) for image in images.images]
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)}


def _aspect(size: Size) -> float:
    return size[0] / size[1]


def _subset_facts(subset: Subset, img_count: int) -> dict[str, object]:
    return {
        "img_count": img_count,
        "num_repeats": subset.num_repeats,
        "color_aug": False,
        "flip_aug": subset.flip_aug,
        "random_crop": False,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator or None,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix or None,
        "caption_suffix": subset.caption_suffix or None,
        "resize_interpolation": subset.resize_interpolation,
        "image_dir": Path(subset.image_dir).name,
        "class_tokens": subset.class_tokens,
        "is_reg": subset.is_reg,
    }


def _folders(data: TrainingData) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for images in data.sets:
        for subset in (subset for subset in images.plan.subsets if not subset.is_reg):
            name, count = Path(subset.image_dir).name, 2
            while name in found:
                name, count = f"{Path(subset.image_dir).name} ({count})", count + 1
            found[name] = {
                "n_repeats": subset.num_repeats,
                "img_count": images.count(subset),
            }
    return found
