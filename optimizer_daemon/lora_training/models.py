"""Loading the parts of a base model, offline, with one clear error when a part is broken."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders import FromOriginalModelMixin
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.config import TrainConfig
from shared.devices import resolve_device
from shared.errors import ResourceError, UserError
from shared.model_folders import single_file_of
from shared.single_file import SingleFile

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Hardware:
    """Where and in which number format the frozen weights are kept.

    Args:
        device: of everything.
        dtype: of the frozen weights; other than float32 it is also what autocast computes in.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def precision(self) -> str:
        """The name kohya's metadata has for it."""
        return {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context the forward pass runs in."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def choose_hardware(config: TrainConfig) -> Hardware:
    """Return what `device` and `mixed_precision` mean on this machine.

    Raises:
        ResourceError: CUDA is asked for and there is none.
        UserError: half precision is asked for on a CPU.
    """
    device = torch.device(resolve_device(config.device))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"device {config.device!r}: torch {torch.__version__} sees no CUDA GPU; use device = 'cpu'")
    precision = config.mixed_precision
    if device.type == "cpu":
        config.require_precision(device.type)
        return Hardware(device, torch.float32)
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return Hardware(device, {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision])


def load_unet(base: BaseModel, hardware: Hardware) -> UNet2DConditionModel:
    """Return the frozen UNet; its convolutions are faster in channels_last, on CPUs and GPUs alike."""
    unet = _part(UNet2DConditionModel, base, "unet")
    return _frozen(unet, hardware.device, hardware.dtype).to(memory_format=torch.channels_last)


def load_vae(base: BaseModel, hardware: Hardware) -> AutoencoderKL:
    """Return the frozen VAE, in float32: its latents are made once for all trainings, and fp16 may overflow."""
    vae = _part(AutoencoderKL, base, "vae")
    return _frozen(vae, hardware.device, torch.float32)


def load_text_encoders(base: BaseModel, hardware: Hardware) -> list[nn.Module]:
    """Return the frozen text encoders: one CLIPTextModel, and SDXL's CLIPTextModelWithProjection behind it."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return [_frozen(_part(kinds[part], base, part), hardware.device, hardware.dtype) for part in base.text_encoders]


def load_tokenizers(base: BaseModel) -> list[CLIPTokenizer]:
    """Return the tokenizer of each text encoder."""
    return [_part(CLIPTokenizer, base, part) for part in base.tokenizers]


def load_noise_scheduler(base: BaseModel) -> DDPMScheduler:
    """Return the forward process the base model was trained with."""
    return _part(DDPMScheduler, base, "scheduler")


def _frozen(module: M, device: torch.device, dtype: torch.dtype) -> M:
    """Move the module, and take gradients, dropout and batch statistics from it."""
    nn.Module.to(
        module, device, dtype
    )  # not diffusers' own, which warns of modules to keep in float32 if there are none
    return module.requires_grad_(False).eval()


def _part(kind: type[T], base: BaseModel, part: str) -> T:
    """Load one part of the base model, offline."""
    transformers_logging.disable_progress_bar()
    disable_diffusers_bars()
    single = single_file_of(base.folder, setting="pretrained_model_name_or_path")
    place = base.folder if single else base.folder / part
    try:
        return _from_folder(kind, place) if single is None else _from_file(kind, single, part)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"{place}: could not be loaded ({error}); copy that part of the base model again") from error


def _from_folder(kind: Any, folder: Path) -> Any:
    only_half = not any(folder.glob("*model.safetensors*")) and any(folder.glob("*.fp16.safetensors"))
    return kind.from_pretrained(folder, local_files_only=True, **({"variant": "fp16"} if only_half else {}))


def _from_file(kind: Any, single: SingleFile, part: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="lora-tuner-") as folder:
        single.write_configs(Path(folder), (part, "scheduler"))
        if part not in single.configs:  # tokenizers and schedulers have no weights
            return kind.from_pretrained(Path(folder, part), local_files_only=True)
        options = {"config": folder, "local_files_only": True}
        if issubclass(kind, FromOriginalModelMixin):
            return kind.from_single_file(str(single.path), subfolder=part, **options)
        # A text encoder of transformers: only a pipeline can load it, and one of it alone does.
        others = {name: None for name in (*single.configs, *single.tokenizers) if name != part}
        pipeline = getattr(diffusers, single.pipeline)
        return getattr(pipeline.from_single_file(str(single.path), **others, **options), part)
