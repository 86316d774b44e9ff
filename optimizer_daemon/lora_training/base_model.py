"""What a base model is, told from its small files alone: wrong models are refused before anything heavy is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.errors import UserError
from shared.model_folders import single_file_of

Family = Literal["sd15", "sdxl"]

_FAMILIES: dict[str, Family] = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
_SD2_WIDTH = 1024  # width of the text encoder of Stable Diffusion 2
_PARTS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
_SECOND_ENCODER = ("text_encoder_2/config.json", "tokenizer_2/tokenizer_config.json")


@dataclass(frozen=True)
class BaseModel:
    """A Stable Diffusion 1.x, 2.x or SDXL base model.

    Args:
        folder: where it lies: a diffusers folder, or one .safetensors file.
        family: sd15, which 2.x belongs to as well, or sdxl.
        vae_factor: image pixels per latent pixel, along one side.
        latent_scale: latents are multiplied by this before training.
        predicts_velocity: it was trained to predict the velocity instead of the noise.
        text_width: width of what the text encoders say of each token, side by side.
    """

    folder: Path
    family: Family
    vae_factor: int
    latent_scale: float
    predicts_velocity: bool
    text_width: int

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The parts that read text, in order."""
        return ("text_encoder", "text_encoder_2") if self.family == "sdxl" else ("text_encoder",)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizer of each text encoder."""
        return tuple(part.replace("text_encoder", "tokenizer") for part in self.text_encoders)

    @property
    def version(self) -> str:
        """The name kohya's metadata has for it, without the objective."""
        if self.family == "sdxl":
            return "sdxl_base_v1-0"
        return "sd_v2" if self.text_width == _SD2_WIDTH else "sd_v1"


def inspect_base_model(folder: Path, *, setting: str = "pretrained_model_name_or_path") -> BaseModel:
    """Return what the configuration files tell.

    Args:
        folder: a diffusers folder or a single file.
        setting: how the user named it, for messages.
    Raises:
        UserError: neither of them, another family, or an incomplete model.
    """
    single = single_file_of(folder, setting=setting)
    setting = f"{setting}: {folder}"
    if single is not None:
        family, parts = single.family, {**single.configs, "scheduler": single.scheduler}
    else:
        family, parts = _of_folder(folder, setting)
    unet, vae = parts["unet"], parts["vae"]
    texts = [config for part, config in parts.items() if part.startswith("text_encoder")]
    if (inputs := unet.get("in_channels")) != (channels := vae.get("latent_channels", 4)):
        raise UserError(
            f"{setting}: its UNet takes {inputs} channels, its VAE makes {channels}; inpainting models are not trained"
        )
    width = sum(int(text.get("hidden_size") or 0) for text in texts)
    if (expected := unet.get("cross_attention_dim")) != width:
        makers = "its text encoder makes" if len(texts) == 1 else "its text encoders make"
        raise UserError(f"{setting}: its UNet expects text of width {expected}, {makers} {width}")
    if family == "sdxl":
        _check_conditions(setting, unet, texts[1])
    return BaseModel(
        folder=folder,
        family=family,
        vae_factor=2 ** (len(vae.get("block_out_channels", ())) - 1),
        latent_scale=float(vae.get("scaling_factor", 0.18215)),
        predicts_velocity=parts["scheduler"].get("prediction_type") == "v_prediction",
        text_width=width,
    )


def _of_folder(folder: Path, setting: str) -> tuple[Family, dict[str, dict[str, Any]]]:
    """Return the family and the configuration of each part of a diffusers folder."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{setting} is no diffusers folder (no model_index.json) and no file; correct the path")
    pipeline = str(_read(folder / "model_index.json").get("_class_name"))
    if pipeline not in _FAMILIES:
        raise UserError(f"{setting} is made for {pipeline}; the native trainer trains {' and '.join(_FAMILIES)} models")
    family = _FAMILIES[pipeline]
    files = _PARTS + (_SECOND_ENCODER if family == "sdxl" else ())
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{setting} lacks {', '.join(missing)}; copy the whole model")
    return family, {Path(file).parent.name: _read(folder / file) for file in files}


def _check_conditions(setting: str, unet: dict[str, Any], second_text: dict[str, Any]) -> None:
    """See that the UNet takes the pooled text and six numbers of sizes, as SDXL's base model does."""
    if (kind := unet.get("addition_embed_type")) != "text_time":
        raise UserError(
            f"{setting}: its UNet takes {kind} beside the text, not sizes (text_time); only SDXL is trained"
        )
    expected = unet.get("projection_class_embeddings_input_dim")
    width = int(second_text.get("projection_dim") or 0) + 6 * int(unet.get("addition_time_embed_dim") or 0)
    if expected != width:
        raise UserError(
            f"{setting}: its UNet expects {expected} numbers of text and sizes, its parts make {width}; "
            "refiners are not trained"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: could not be read ({error}); copy the model again") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no JSON object; copy the model again")
    return document
