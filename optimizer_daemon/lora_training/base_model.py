"""What a base model is, told from its small files alone: wrong models are refused before anything heavy is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError

_PIPELINE = "StableDiffusionPipeline"
_SD2_WIDTH = 1024  # width of the text encoder of Stable Diffusion 2
_PARTS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)


@dataclass(frozen=True)
class BaseModel:
    """A Stable Diffusion 1.5-like model in a diffusers folder.

    Args:
        folder: where it lies.
        vae_factor: image pixels per latent pixel, along one side.
        latent_scale: latents are multiplied by this before training.
        predicts_velocity: it was trained to predict the velocity instead of the noise.
        text_width: width of the text encoder's output.
    """

    folder: Path
    vae_factor: int
    latent_scale: float
    predicts_velocity: bool
    text_width: int

    @property
    def version(self) -> str:
        """The name kohya's metadata has for it, without the objective."""
        return "sd_v2" if self.text_width == _SD2_WIDTH else "sd_v1"


def inspect_base_model(folder: Path, *, setting: str = "pretrained_model_name_or_path") -> BaseModel:
    """Return what the configuration files tell.

    Args:
        folder: a diffusers folder.
        setting: how the user named it, for messages.
    Raises:
        UserError: a single file, no diffusers folder, another family, or an incomplete folder.
    """
    setting = f"{setting}: {folder}"
    if folder.is_file():
        raise UserError(f"{setting} is a single file; the native trainer needs a diffusers folder, so convert it first")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{setting} is no diffusers folder (no model_index.json); correct the path")
    pipeline = _read(folder / "model_index.json").get("_class_name")
    if pipeline != _PIPELINE:
        raise UserError(f"{setting} is made for {pipeline}; the native trainer trains {_PIPELINE} models (SD 1.x) only")
    if missing := [part for part in _PARTS if not (folder / part).is_file()]:
        raise UserError(f"{setting} lacks {', '.join(missing)}; copy the whole model")
    unet, vae = _read(folder / "unet/config.json"), _read(folder / "vae/config.json")
    text = _read(folder / "text_encoder/config.json")
    if (inputs := unet.get("in_channels")) != (channels := vae.get("latent_channels", 4)):
        raise UserError(
            f"{setting}: its UNet takes {inputs} channels, its VAE makes {channels}; inpainting models are not trained"
        )
    if (expected := unet.get("cross_attention_dim")) != (width := text.get("hidden_size")):
        raise UserError(f"{setting}: its UNet expects text of width {expected}, its text encoder makes {width}")
    return BaseModel(
        folder=folder,
        vae_factor=2 ** (len(vae.get("block_out_channels", ())) - 1),
        latent_scale=float(vae.get("scaling_factor", 0.18215)),
        predicts_velocity=_read(folder / "scheduler/scheduler_config.json").get("prediction_type") == "v_prediction",
        text_width=int(width or 0),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: could not be read ({error}); copy the model again") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no JSON object; copy the model again")
    return document
