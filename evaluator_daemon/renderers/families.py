"""The families of base models: what a pipeline's folder holds, and how its text encoders are asked.

Stable Diffusion 1.x and 2.x have one text encoder; clip skip counts its layers from the end, and the last norm follows.
SDXL has two, whose last layers but one are laid side by side; as in kohya's training, clip skip does not count there.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (  # noqa: F401  loaded lazily otherwise; here they are part of what a fork shares
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401  likewise
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from shared.errors import IncompleteCheckpointError, ResourceError, SettingsError
from shared.model_folders import single_file_of


@dataclass(frozen=True)
class TextEmbedding:
    """What the UNet is told about each prompt.

    Args:
        states: (n, tokens, width).
        pooled: (n, width of SDXL's second text encoder); None where the family has none.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None

    def row(self, index: int) -> TextEmbedding:
        """Return one prompt's, still with n = 1."""
        one = slice(index, index + 1)
        return TextEmbedding(self.states[one], None if self.pooled is None else self.pooled[one])

    @staticmethod
    def stacked(rows: Sequence[TextEmbedding]) -> TextEmbedding:
        """Put several behind each other."""
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextEmbedding(torch.cat([row.states for row in rows]), torch.cat(pooled) if pooled else None)


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x."""

    pipeline_class: Any = StableDiffusionPipeline
    without: Mapping[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kohya_prefixes: Mapping[str, str] = {"unet": "lora_unet", "text_encoder": "lora_te"}

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def adaptable(self) -> dict[str, nn.Module]:
        """Component -> the model that a LoRA may change."""
        return {component: getattr(self.pipeline, component) for component in self.kohya_prefixes}

    def keeps_vae_precise(self) -> bool:
        """Whether half precision overflows in the VAE, which then works in float32."""
        return False

    def encode(self, prompts: Sequence[str], clip_skip: int) -> TextEmbedding:
        """Encode the prompts in one batch.

        Args:
            clip_skip: which text encoder layer from the end is used; 1 is the last.
        """
        encoder = self.pipeline.text_encoder
        states = self._hidden(self.pipeline.tokenizer, encoder, prompts).hidden_states[-clip_skip]
        # transformers < 5.6 keeps the layers in .text_model; hidden states come before the last norm
        return TextEmbedding(getattr(encoder, "text_model", encoder).final_layer_norm(states), None)

    def conditions(self, text: TextEmbedding, width: int, height: int) -> dict[str, torch.Tensor] | None:
        """What the UNet takes beside the text's states: nothing."""
        del text, width, height
        return None

    def _hidden(self, tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Any:
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return encoder(ids.to(encoder.device), output_hidden_states=True)


class StableDiffusionXL(StableDiffusion):
    """SDXL's base model; without a refiner."""

    pipeline_class: Any = StableDiffusionXLPipeline
    without: Mapping[str, Any] = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    kohya_prefixes: Mapping[str, str] = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

    def keeps_vae_precise(self) -> bool:
        """See `StableDiffusion`; the VAE's own configuration says so, and fixed ones say otherwise."""
        return bool(self.pipeline.vae.config.force_upcast)

    def encode(self, prompts: Sequence[str], clip_skip: int) -> TextEmbedding:
        """See `StableDiffusion`. An empty prompt is encoded like any other, as kohya's and A1111's sampling do."""
        del clip_skip
        first = self._hidden(self.pipeline.tokenizer, self.pipeline.text_encoder, prompts)
        second = self._hidden(self.pipeline.tokenizer_2, self.pipeline.text_encoder_2, prompts)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return TextEmbedding(states, second.text_embeds)

    def conditions(self, text: TextEmbedding, width: int, height: int) -> dict[str, torch.Tensor] | None:
        """The pooled text, and original size, crop and target size in pixels: a picture that was never cropped."""
        assert text.pooled is not None
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=text.states.dtype)
        return {
            "text_embeds": text.pooled,
            "time_ids": sizes.to(text.states.device).expand(len(text.states), -1),
        }


FAMILIES: Mapping[str, type[StableDiffusion]] = {
    family.pipeline_class.__name__: family for family in (StableDiffusion, StableDiffusionXL)
}
"""Pipeline class in model_index.json -> its family."""


def load_family(base_model: Path, dtype: torch.dtype) -> StableDiffusion:
    """Load a diffusers folder or a single file onto the CPU, offline.

    Raises:
        SettingsError: it is no pipeline of a known family, or cannot be loaded.
        ResourceError: it is not there, or cannot be read.
    """
    try:
        single = single_file_of(base_model)
    except SettingsError as error:
        if isinstance(error.__cause__, IncompleteCheckpointError):  # gone, unreadable, or just being copied
            raise _unreadable(base_model, error.__cause__.reason) from error
        raise
    name = single.pipeline if single else _class_name(base_model)
    if name not in FAMILIES:
        raise SettingsError(
            "--base-model", str(base_model), f"{name} cannot be rendered; {' and '.join(sorted(FAMILIES))} can"
        )
    family = FAMILIES[name]
    disable_diffusers_bars()
    disable_transformers_bars()  # type: ignore[no-untyped-call]
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    options = {"dtype": dtype, "local_files_only": True, **family.without}
    try:
        if single is None:
            return family(family.pipeline_class.from_pretrained(base_model, **options))
        with tempfile.TemporaryDirectory(prefix="lora-tuner-") as config:
            single.write_configs(Path(config))
            return family(family.pipeline_class.from_single_file(str(base_model), config=config, **options))
    except (OSError, ValueError) as error:
        raise SettingsError(
            "--base-model", str(base_model), f"copy the model again, diffusers cannot load it ({error})"
        ) from error


def _class_name(folder: Path) -> Any:
    index = folder / "model_index.json"
    try:
        return json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except OSError as error:
        raise _unreadable(index, error.strerror) from error
    except ValueError as error:
        raise SettingsError("--base-model", str(index), f"mend or copy that file again ({error})") from error


def _unreadable(path: Path, why: str | None) -> ResourceError:
    return ResourceError(f"{path}: the base model cannot be read ({why}); put it back or make it readable")
