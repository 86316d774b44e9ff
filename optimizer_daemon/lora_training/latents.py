"""Images as latents, encoded once for all trainings.

The cache has one file per (VAE, image, size, flip):

    <cache>/<first 16 digits of the VAE's digest>/<image digest>-<resized>-<bucket>[-<how>][-flipped].safetensors

where <how> is the interpolation of an image that had to be resized.

Digests are of contents, so an edited image or another VAE is another file, and trainings may share the folder and fill
it at the same time: each file appears whole, and whoever writes it writes the same but for rounding, in which a GPU and
a CPU differ. Each carries a checksum: one that a disk or a hand has damaged is encoded again. What is frozen is one
sample of the VAE's posterior, drawn with a seed taken from the file's own name.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.dataset import Batch, TrainingImage
from optimizer_daemon.lora_training.dataset_settings import Interpolation
from optimizer_daemon.lora_training.models import Hardware, load_vae
from optimizer_daemon.lora_training.resizing import interpolation_for, resize
from shared.errors import DiskError, UserError
from shared.files import write_bytes
from shared.model_folders import digest_part

_LATENT = "latent"
_SAY_EVERY_S = 1.0


class Latents:
    """Every training image as a scaled latent, in the host's memory: a batch of them is small, all of them are not.

    Args:
        tensors: by `latent_name`, each (channels, height, width) in latent pixels.
        device: where batches go.
        encoded: how many were not in the cache.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device, encoded: int) -> None:
        self._tensors = tensors
        self._device = device
        self.encoded = encoded

    @property
    def cached(self) -> int:
        """How many were in the cache."""
        return len(self._tensors) - self.encoded

    def of(self, batch: Batch) -> Tensor:
        """Return (batch, channels, height, width), on the training device."""
        latents = torch.stack([self._tensors[latent_name(draw.image, flipped=draw.flipped)] for draw in batch])
        if self._device.type == "cuda":  # a copy from pinned memory is waited for by nobody but its users
            latents = latents.pin_memory()
        return latents.to(self._device, non_blocking=True)


def default_cache_dir() -> Path:
    """Return where latents are kept when the configuration names no folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "lora-tuner" / "latents"


def load_latents(
    images: Sequence[TrainingImage],
    base: BaseModel,
    hardware: Hardware,
    cache_dir: Path,
    check_stop: Callable[[], None],
) -> Latents:
    """Return the latents of all images; the VAE is loaded only when one of them is not in the cache.

    Args:
        images: the training images; with flip_aug each is encoded a second time, mirrored.
        base: the base model; its VAE's digest is part of the key.
        hardware: where the VAE runs, and where batches go.
        cache_dir: made when missing.
        check_stop: called between two images; may raise.
    Raises:
        UserError: an image cannot be decoded, or its latent is not finite.
        DiskError: the cache cannot be written.
    """
    folder = cache_dir / digest_part(base.folder, "vae", setting="pretrained_model_name_or_path")[:16]
    _make(folder)
    vae: AutoencoderKL | None = None
    tensors: dict[str, Tensor] = {}
    encoded, said_at = 0, time.monotonic()
    for number, image in enumerate(images, 1):
        for flipped in (False, True) if image.subset.flip_aug else (False,):
            name = latent_name(image, flipped=flipped)
            if name in tensors:
                continue
            latent = _read(folder / name)
            if latent is None:
                check_stop()
                vae = vae or load_vae(base, hardware)
                latent = encode(vae, image, flipped=flipped)
                write_bytes(folder / name, _content(latent))
                encoded += 1
                if time.monotonic() - said_at >= _SAY_EVERY_S:  # who watches takes silence for a hang
                    print(f"encoding latents: {number}/{len(images)} images", flush=True)
                    said_at = time.monotonic()
            tensors[name] = latent * base.latent_scale
    return Latents(tensors, hardware.device, encoded)


def latent_name(image: TrainingImage, *, flipped: bool) -> str:
    """Return the cache's file name, e.g. <digest>-600x512-512x512-area-flipped.safetensors."""
    sizes = [f"{width}x{height}" for width, height in (image.fit.resized, image.fit.bucket)]
    how = [] if image.size == image.fit.resized else [_interpolation(image)]
    return f"{'-'.join([image.sha256, *sizes, *how, *(['flipped'] if flipped else [])])}.safetensors"


@torch.no_grad()
def encode(vae: AutoencoderKL, image: TrainingImage, *, flipped: bool) -> Tensor:
    """Return the frozen, unscaled latent (channels, height, width), float32 on the CPU.

    Raises:
        UserError: the image cannot be decoded, or its latent is not finite.
    """
    pixels = read_pixels(image)
    if flipped:
        pixels = pixels.flip(-1)
    seed = int.from_bytes(hashlib.sha256(latent_name(image, flipped=flipped).encode()).digest()[:8], "big") >> 1
    posterior = vae.encode(pixels[None].to(vae.device)).latent_dist
    latent: Tensor = posterior.sample(torch.Generator().manual_seed(seed))[0].float().cpu()
    if not latent.isfinite().all():
        raise UserError(f"{image.path}: the base model's VAE makes no finite latent of it; check the VAE and the image")
    return latent.contiguous()


def read_pixels(image: TrainingImage) -> Tensor:
    """Return the image at its training size, (3, height, width), float32 in [-1, 1]; the crop is central.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with Image.open(image.path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{image.path} could not be decoded ({error}); mend or remove it") from error
    if image.size != image.fit.resized:
        pixels = resize(pixels, image.fit.resized, _interpolation(image))
    left, top = ((resized - side) // 2 for resized, side in zip(image.fit.resized, image.fit.bucket, strict=True))
    pixels = pixels[top : top + image.fit.bucket[1], left : left + image.fit.bucket[0]]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def _interpolation(image: TrainingImage) -> Interpolation:
    return interpolation_for(image.size, image.fit.resized, image.subset.resize_interpolation)


def _read(path: Path) -> Tensor | None:
    """Return a cached latent; None when there is none, or a damaged one, which is then written again."""
    try:
        content = path.read_bytes()
        latent = parse_tensors(content)[_LATENT]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError):  # what damaged headers lead to
        return None
    return latent if content == _content(latent) else None


def _content(latent: Tensor) -> bytes:
    """Return the file of a latent: a changed bit makes it differ from what its tensor would be written as."""
    return to_bytes({_LATENT: latent}, metadata={"sha256": hashlib.sha256(latent.numpy().tobytes()).hexdigest()})


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(folder, error) from error
