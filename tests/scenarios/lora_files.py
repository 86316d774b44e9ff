"""LoRA files that fit the tiny world's base model, good and bad, written without torch."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from functools import cache

import numpy as np

from examples.tiny_world.paths import BASE_MODEL
from shared.safetensors_file import read_header
from tests.shared.weight_files import Parts, file_with

Shapes = Mapping[str, tuple[int, ...]]
RANK, ALPHA = 4, 2.0
STANDARD = {"ss_network_module": "networks.lora", "ss_network_dim": str(RANK), "ss_network_alpha": str(ALPHA)}
"""What sd-scripts and the native trainer write into the metadata."""

_UNET_LAYER = re.compile(r"(.+\.attentions\..+)\.weight")
_TEXT_LAYER = re.compile(r"(?:text_model\.)?(encoder\.layers\..+)\.weight")


@cache
def unet_shapes() -> Shapes:
    """The UNet's layers that a usual LoRA adapts: dotted name -> shape of the weight."""
    return _shapes("unet/diffusion_pytorch_model.safetensors", _UNET_LAYER)


@cache
def text_shapes() -> Shapes:
    """The same of the text encoder."""
    return _shapes("text_encoder/model.safetensors", _TEXT_LAYER)


def kohya(shapes: Shapes, prefix: str) -> Shapes:
    """Return the layers under the names that sd-scripts gives them."""
    return {f"{prefix}_{name.replace('.', '_')}": shape for name, shape in shapes.items()}


@cache
def unet() -> Shapes:
    """The UNet's usual modules in kohya's names."""
    return kohya(unet_shapes(), "lora_unet")


@cache
def text_encoder() -> Shapes:
    """The text encoder's usual modules in kohya's names."""
    return kohya(text_shapes(), "lora_te_text_model")


def every_module() -> Shapes:
    """Everything the native trainer and sd-scripts train by default."""
    return {**unet(), **text_encoder()}


def parts(
    seed: int, modules: Shapes | None = None, *, rank: int = RANK, alpha: float | None = ALPHA, strength: float = 0.02
) -> Parts:
    """Return random tensors in half precision: module.lora_down.weight, .lora_up.weight and .alpha."""
    random = np.random.default_rng(seed)
    found: Parts = {}
    for module, (out, into, *kernel) in sorted((modules or every_module()).items()):
        found[f"{module}.lora_down.weight"] = _half(random.normal(size=(rank, into, *kernel)))
        found[f"{module}.lora_up.weight"] = _half(random.normal(size=(out, rank, *[1 for _ in kernel])) * strength)
        if alpha is not None:
            found[f"{module}.alpha"] = "F16", [], struct.pack("<e", alpha)
    return found


def lora(seed: int, modules: Shapes | None = None, *, metadata: dict[str, str] | None = None, **options) -> bytes:
    """Return a whole file in kohya's form."""
    return file_with(parts(seed, modules, **options), metadata)


def peft_lora(seed: int, modules: Shapes, *, rank: int = RANK, metadata: dict[str, str] | None = None) -> bytes:
    """Return a whole file with diffusers' names; `modules` are dotted, beginning with unet. or text_encoder."""
    renamed = {
        name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): part
        for name, part in parts(seed, modules, rank=rank, alpha=None).items()
    }
    return file_with(renamed, metadata)


def _half(values: np.ndarray) -> tuple[str, list[int], bytes]:
    return "F16", list(values.shape), values.astype("<f2").tobytes()


def _shapes(file: str, layer: re.Pattern[str]) -> Shapes:
    found = {}
    for name, tensor in read_header(BASE_MODEL / file, BASE_MODEL).tensors.items():
        if (match := layer.fullmatch(name)) and len(tensor.shape) > 1:
            found[match[1]] = tensor.shape
    return found
